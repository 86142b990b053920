"""The grammar of model-valued fields: from what a spec says to a folder, an artifact or a hub repository."""

import fnmatch
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sqlalchemy.orm import Session

from app.aliases import repository as aliases
from app.artifacts import inspect, repository
from app.errors import BadRequest, Code, NotFound
from app.models import Artifact, Job
from app.settings import Settings
from app.specs import RefTo
from app.states import JobState
from app.storage import Storage

_LONGEST_CHAIN = 64
_HUB_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$")
_NAME = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]{0,62})(?::v(\d{1,6})|@([A-Za-z0-9][A-Za-z0-9._-]{0,62}))?$")
_REVISION = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")


@dataclass(frozen=True)
class Resolved:
    """Where a reference leads. Exactly one of ``folder``, ``hub`` and ``job_id`` is set."""

    pinned: str
    """The reference with nothing left to interpretation."""
    folder: Path | None = None
    hub: str | None = None
    revision: str | None = None
    job_id: str | None = None
    artifact: Artifact | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def references(spec: BaseModel, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Every reference field that is set: its path, its kind (model, adapter, file) and its value."""
    for name, info in type(spec).model_fields.items():
        value = getattr(spec, name)
        where = f"{path}{name}"
        kind = next((mark.kind for mark in _marks(info) if isinstance(mark, RefTo)), None)
        if kind and isinstance(value, str):
            yield where, kind, value
        elif kind and isinstance(value, list):
            yield from ((f"{where}.{number}", kind, entry) for number, entry in enumerate(value))
        else:
            yield from _within(value, where)


def _within(value: Any, where: str) -> Iterator[tuple[str, str, str]]:
    """The same of what stands in a field: a part of the spec, or a list or an object of such parts."""
    if isinstance(value, BaseModel):
        yield from references(value, f"{where}.")
    elif isinstance(value, list | dict):
        for key, inner in enumerate(value) if isinstance(value, list) else value.items():
            yield from _within(inner, f"{where}.{key}")


def _marks(info: Any) -> list[Any]:
    """Metadata of a field, also where it stands inside ``X | None`` or ``list[X] | None``."""
    marks = list(info.metadata)
    for option in getattr(info.annotation, "__args__", ()):
        marks += list(getattr(option, "__metadata__", ()))
        for entry in getattr(option, "__args__", ()):
            marks += list(getattr(entry, "__metadata__", ()))
    return marks


def resolve(
    session: Session, settings: Settings, project_id: str, value: str, *, param: str, revision: str | None = None
) -> Resolved:
    """Follows the grammar of the contract in its order. Raises NotFound or BadRequest that names ``param``."""
    if "\0" in value:
        raise BadRequest(f"{param}: a reference holds no NUL", param=param)
    if value.startswith("artifact:"):
        return _artifact(session, settings, project_id, value.removeprefix("artifact:"), param)
    if value.startswith("job:"):
        return _job(session, settings, project_id, value.removeprefix("job:"), param)
    if value.startswith("hub:"):
        repo, _, at = value.removeprefix("hub:").partition("@")
        return _hub(settings, repo, at or revision, param)
    if value.startswith(("/", "./", "../", "~")):
        return _path(session, settings, project_id, value, param)
    match = _NAME.match(value)
    if match:
        artifact = _named(session, project_id, match[1], match[2], match[3])
        if artifact is not None:
            return from_artifact(settings, artifact)
        if match[2] or match[3]:
            raise NotFound(
                f"{param}: there is no model {value}",
                param=param,
                code=Code.MODEL_NOT_FOUND,
                hint="GET /artifacts lists names and versions, GET /aliases the aliases.",
            )
    return _hub(settings, value, revision, param)


def _named(session: Session, project_id: str, name: str, version: str | None, alias: str | None) -> Artifact | None:
    """``name:v3``, ``name@alias`` where that alias points to a version of this name, an alias alone, or a name alone.

    An alias goes before a name: who made it said which version is meant.
    """
    if version is not None:
        return repository.by_name(session, project_id, name, int(version))
    aliased = aliases.target(session, project_id, alias or name)
    if alias is not None:
        return aliased if aliased is not None and aliased.name == name else None
    return aliased or repository.by_name(session, project_id, name, None)


def chain_of(
    session: Session, settings: Settings, project_id: str, found: Resolved, *, param: str
) -> tuple[Resolved, list[Resolved]]:
    """The model at the root of what an adapter was trained on, and the adapters between, oldest first.

    For a whole model: itself, and none. Raises NotFound or BadRequest for a link that is gone.
    """
    between: list[Resolved] = []
    root = found
    while root.folder is not None and inspect.looks_like_adapter(root.folder) and root.facts.get("base"):
        if root is not found:
            between.insert(0, root)
        if len(between) > _LONGEST_CHAIN:
            raise BadRequest(f"{param}: more than {_LONGEST_CHAIN} adapters on each other", param=param)
        root = resolve(session, settings, project_id, root.facts["base"], param=param)
    return root, between


def from_artifact(settings: Settings, artifact: Artifact) -> Resolved:
    """An artifact as a reference."""
    folder = Storage(settings.data_dir).artifact_dir(artifact.id)
    return Resolved(
        pinned=f"artifact:{artifact.id}",
        folder=folder,
        artifact=artifact,
        facts={
            "artifact_id": artifact.id,
            "name": artifact.name,
            "kind": artifact.kind,
            "base_chain": artifact.base_chain,
            **artifact.facts,
        },
    )


def _artifact(session: Session, settings: Settings, project_id: str, artifact_id: str, param: str) -> Resolved:
    artifact = repository.get(session, project_id, artifact_id)
    if artifact is None:
        raise NotFound(f"{param}: there is no artifact {artifact_id}", param=param, code=Code.MODEL_NOT_FOUND)
    return from_artifact(settings, artifact)


def _job(session: Session, settings: Settings, project_id: str, job_id: str, param: str) -> Resolved:
    # Locked where there are row locks: it must not end between this look and the new row that waits for it.
    job = session.get(Job, job_id, with_for_update={"read": True})
    if job is None or job.project_id != project_id:
        raise NotFound(f"{param}: there is no job {job_id}", param=param, code=Code.MODEL_NOT_FOUND)
    left = [artifact for artifact in repository.of_job(session, job_id) if artifact.kind != "report"]
    if left:
        return from_artifact(settings, left[-1])
    if JobState(job.state).terminal:
        raise BadRequest(f"{param}: {job_id} is {job.state} and left no model", param=param, code=Code.MODEL_NOT_FOUND)
    return Resolved(pinned=f"job:{job_id}", job_id=job_id)


def _path(session: Session, settings: Settings, project_id: str, value: str, param: str) -> Resolved:
    path = Path(os.path.expanduser(value)).resolve()
    if path.is_relative_to(settings.data_dir):
        parts = path.relative_to(settings.data_dir).parts
        artifact = (
            repository.get(session, project_id, parts[1]) if len(parts) == 2 and parts[0] == "artifacts" else None
        )
        if artifact is not None:
            return from_artifact(settings, artifact)
        found = _checkpoint(session, settings, project_id, path, param)
        if found is None:
            raise NotFound(f"{param}: there is no model at {value}", param=param, code=Code.MODEL_NOT_FOUND)
        return found
    if not any(path.is_relative_to(root) for root in settings.model_roots):
        roots = ":".join(str(root) for root in settings.model_roots) or "none are set"
        raise BadRequest(
            f"{param}: {value} lies outside the folders that models may come from",
            param=param,
            code=Code.MODEL_OUTSIDE_ROOTS,
            hint=f"The operator sets TUNESMITH_MODEL_ROOTS ({roots}).",
        )
    if not os.path.exists(path):  # unlike Path.exists it is False for a name that is too long
        raise NotFound(f"{param}: there is nothing at {value}", param=param, code=Code.MODEL_NOT_FOUND)
    return Resolved(pinned=str(path), folder=path)


def _checkpoint(session: Session, settings: Settings, project_id: str, path: Path, param: str) -> Resolved | None:
    """A checkpoint by its own folder or by the one of the view, whose files are links; None for any other path."""
    link = next((path / name for name in ("adapter_config.json", "config.json") if (path / name).is_symlink()), None)
    folder = link.resolve().parent if link else path
    if not folder.is_relative_to(settings.data_dir):
        return None
    job = repository.job_of_checkpoint(session, project_id, str(folder.relative_to(settings.data_dir)))
    if job is None or not folder.is_dir():
        return None
    block = job.resolved_spec["model"]
    base = resolve(session, settings, project_id, block["model_name_or_path"], param=param)
    kind = "adapter" if inspect.looks_like_adapter(folder) else "model"
    facts = {
        "name": f"{job.experiment_name}:ckpt-{folder.name.removeprefix('checkpoint-')}",
        "kind": "reward" if job.algorithm == "reward" else kind,
        "base": base.pinned,
        "base_artifact_id": base.artifact.id if base.artifact else None,
        "base_chain": [*(base.facts.get("base_chain") or [base.pinned]), f"{job.algorithm}:{job.id}"],
        "rounded": (block.get("quantization_config") or {}).get("bnb_4bit_quant_type"),
    }
    return Resolved(pinned=str(folder), folder=folder, facts=facts)


def _hub(settings: Settings, repo: str, revision: str | None, param: str) -> Resolved:
    if not _HUB_ID.match(repo) or "--" in repo or ".." in repo:
        raise BadRequest(
            f"{param}: {repo[:96]!r} is neither a path, a registered name nor a hub id",
            param=param,
            code=Code.INVALID_VALUE,
            hint="A hub id looks like org/name; a path starts with / or ./",
        )
    if revision is not None and (not _REVISION.match(revision) or ".." in revision):
        raise BadRequest(f"{param}: the revision {revision[:64]!r} is not a git revision", param=param)
    if not any(fnmatch.fnmatchcase(repo, pattern) for pattern in settings.allowed_hub_repos):
        raise BadRequest(
            f"{param}: {repo} is not on the list of allowed hub repositories",
            param=param,
            code=Code.MODEL_NOT_ALLOWED,
            hint="The operator sets TUNESMITH_ALLOWED_HUB_REPOS.",
        )
    return Resolved(pinned=f"hub:{repo}" + (f"@{revision}" if revision else ""), hub=repo, revision=revision)
