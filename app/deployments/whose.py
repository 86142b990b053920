"""Under which names engines answer as exactly one model; for whoever must not ask another one by mistake."""

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.aliases import repository as aliases
from app.deployments import loaded, repository
from app.errors import BadRequest, Code, NotFound
from app.models import Artifact


class _Entry(NamedTuple):
    name: str
    model: str
    """What it serves, as a pinned reference."""
    on: str | None
    """Of an adapter: the deployment that has it."""
    answers: bool = True
    """False: it makes embeddings."""


def names_for(
    session: Session, project_id: str, pinned: str, name: str | None, *, param: str, beside: str | None = None
) -> Sequence[str]:
    """Names of what is served, or about to be, as the model behind a pinned reference; the best one first.

    ``name`` is a deployment, an adapter that one has, or an alias that leads to the model; None: whatever serves it,
    and first what has the adapter ``beside`` loaded. Raises NotFound where nothing does, BadRequest where ``name``
    serves another model.
    """
    entries = _entries(session, project_id)
    same = _same(session, project_id, pinned)
    fitting = [entry.name for entry in entries if entry.model in same and entry.answers]
    own = next((entry for entry in entries if entry.name == name), None)
    if own is not None and not own.answers:
        raise BadRequest(
            f"{param}: {own.name} makes embeddings, and answers nothing",
            param=param,
            code=Code.CONFLICTING_FIELDS,
            hint=f"Name a deployment of {pinned} without task: embed.",
        )
    if own is not None:
        if own.model in same:
            return [own.name]
        raise _another(param, own.name, own.model, pinned)
    if name is not None:
        alias = aliases.get(session, project_id, name)
        if alias is None:
            raise _nobody(param, f"{name!r} is not being served")
        targets = [f"artifact:{target}" for target in (alias.artifact_id, alias.canary_artifact_id) if target]
        if same.isdisjoint(targets):
            raise _another(param, name, targets[0], pinned)
        if not fitting:
            raise _nobody(param, f"nothing serves what the alias {name} points to")
    if not fitting:
        raise _nobody(param, f"no deployment serves {pinned}")
    hosts = {entry.on for entry in entries if entry.name == beside}
    return sorted(fitting, key=lambda found: found not in hosts)


def _entries(session: Session, project_id: str) -> list[_Entry]:
    rows = repository.live(session, project_id)
    whole = [_Entry(row.name, row.model, None, not repository.embeds(row)) for row in rows]
    adapters = loaded.live(session, project_id)
    return [*whole, *(_Entry(adapter.name, adapter.model, row.name) for adapter, row in adapters)]


def _same(session: Session, project_id: str, pinned: str) -> set[str]:
    """References to the same bytes: a model that was published twice is one model."""
    found = session.get(Artifact, pinned.removeprefix("artifact:")) if pinned.startswith("artifact:") else None
    if found is None:
        return {pinned}
    twins = select(Artifact.id).where(Artifact.project_id == project_id, Artifact.sha256 == found.sha256)
    return {pinned, *(f"artifact:{twin}" for twin in session.scalars(twins))}


def _another(param: str, name: str, serves: str, wanted: str) -> BadRequest:
    field = "model" if param == "deployment" else "baseline"
    return BadRequest(
        f"{param}: {name} serves {serves}, and {field} is {wanted}",
        param=param,
        code=Code.CONFLICTING_FIELDS,
        hint=f"Name {serves} as {field}, or a deployment of {wanted}.",
    )


def _nobody(param: str, what: str) -> NotFound:
    return NotFound(
        f"{param}: {what}",
        param=param,
        code=Code.MODEL_NOT_FOUND,
        hint="GET /v1/models lists what is served; POST /deployments starts more. Without deployment the job loads it.",
    )
