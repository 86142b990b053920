"""What can be done with the adapters of a deployment: have one loaded, take it off again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app.db import Database
from app.deployments import hotload, loaded, repository
from app.deployments.schemas import AdapterIn, AdapterOut
from app.errors import BadRequest, Code, Conflict, NotFound
from app.models import Artifact, Deployment, DeploymentAdapter
from app.settings import Settings
from app.specs import DeploymentOptions
from app.states import AdapterState, DeploymentState, Desired

MOST = 1024
"""Adapters of one deployment, loaded or put away."""


@dataclass(frozen=True)
class Looked:
    """An adapter under the name that it is to have, and why it cannot be loaded into an engine (None: it can)."""

    candidate: hotload.Candidate
    name: str
    fault: str | None


def look(
    database: Database, settings: Settings, project_id: str, wanted: Sequence[AdapterIn], max_rank: int, param: str
) -> list[Looked]:
    """Finds the adapters and reads their files, outside of any transaction. Raises NotFound, BadRequest."""
    with database.read() as session:
        found = [
            hotload.find(session, settings, project_id, entry.adapter, param=_at(param, number))
            for number, entry in enumerate(wanted)
        ]
    looked = []
    for number, (entry, candidate) in enumerate(zip(wanted, found, strict=True)):
        name = entry.name or candidate.name
        if name is None:
            where = _at(param, number, "name")
            raise BadRequest(f"{where} is missing", param=where, code=Code.MISSING_FIELD, hint="Name the adapter.")
        looked.append(Looked(candidate, name, hotload.fault(candidate, max_rank)))
    return looked


def _at(param: str, number: int, field: str = "adapter") -> str:
    return f"{param}.{number}.{field}" if param else field


def attach(
    session: Session, row: Deployment, adapter: Looked, key_id: str | None, *, param: str = "adapter"
) -> DeploymentAdapter:
    """The adapter is to be loaded; the same one under the same name again is the same row, tried again if it failed.

    Raises BadRequest adapter_not_servable with the reason, Conflict for a name that is taken and for a deployment that
    ends or loads no adapters.
    """
    if row.desired == Desired.STOPPED or row.status in (DeploymentState.STOPPED, DeploymentState.FAILED):
        raise Conflict(f"the deployment is {row.status}", hint="Start it again with POST /deployments.")
    if not row.options.get("hot_load"):
        raise Conflict(
            f"{row.name} loads no adapters", hint="Deploy the base with hot_load: true, or merge the adapter."
        )
    fault = adapter.fault
    if fault is None and not hotload.serves_base_of(session, row, adapter.candidate):
        fault = f"it was trained on {adapter.candidate.root.pinned}, and {row.name} serves {row.model}"
    if fault is not None:
        raise not_servable(adapter.candidate.adapter.pinned, fault, param)
    pinned = adapter.candidate.adapter.pinned
    known = loaded.get(session, row.id, adapter.name)
    if known is not None and known.model == pinned:
        loaded.move(session, known, AdapterState.WAITING, only_from=[AdapterState.FAILED], error=None, effect=None)
        return session.get_one(DeploymentAdapter, (row.id, adapter.name))
    check_free(session, row.project_id, adapter.name)
    if len(loaded.of(session, [row.id])[row.id]) >= MOST:
        raise Conflict(f"{row.name} has {MOST} adapters", hint="Take some off: DELETE /deployments/{id}/adapters/….")
    artifact = adapter.candidate.adapter.artifact
    made = DeploymentAdapter(
        deployment_id=row.id,
        name=adapter.name,
        project_id=row.project_id,
        created_by=key_id,
        model=pinned,
        artifact_id=artifact.id if artifact is not None else None,
    )
    session.add(made)
    session.flush()
    return made


def nearest(
    session: Session, project_id: str, candidate: hotload.Candidate, rank: int, asked: DeploymentOptions | None = None
) -> Deployment | None:
    """Of the deployments of the adapter's base that have room for its rank, the one that is nearest to answering.

    A parser that is asked for by name is the deployment's too.
    """
    named = asked.model_dump(include={"tool_call_parser", "reasoning_parser"}) if asked is not None else {}
    needed = {field: value for field, value in named.items() if value != "auto"}
    fitting = [
        row
        for row in repository.live(session, project_id)
        if row.desired != Desired.STOPPED
        and row.options.get("hot_load")
        and row.options.get("max_lora_rank", 0) >= rank
        and needed.items() <= row.options.items()
        and hotload.serves_base_of(session, row, candidate)
    ]
    order = (DeploymentState.READY, DeploymentState.UNHEALTHY, DeploymentState.STARTING)
    return min(fitting, key=lambda row: order.index(row.status) if row.status in order else len(order), default=None)


def check_adapters_fit(
    session: Session, row: Deployment, model: str, artifact_id: str | None, options: dict[str, Any]
) -> None:
    """Whether what is to replace a deployment could load the adapters that it has. Raises Conflict."""
    names = [entry.name for entry in loaded.of(session, [row.id])[row.id]]
    if not names:
        return
    shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    if not options["hot_load"]:
        raise Conflict(
            f"hot_load: {row.name} has adapters ({shown})",
            param="hot_load",
            hint="Take them off first, or leave it on.",
        )
    if model != row.model and not _same_bytes(session, row.artifact_id, artifact_id):
        raise Conflict(
            f"model: the adapters of {row.name} ({shown}) were trained on {row.model}",
            param="model",
            hint=f"Take them off first (DELETE /deployments/{row.id}/adapters/…), or deploy the model by another name.",
        )


def _same_bytes(session: Session, one: str | None, other: str | None) -> bool:
    mine, its = (session.get(Artifact, artifact_id) if artifact_id else None for artifact_id in (one, other))
    return mine is not None and its is not None and mine.sha256 == its.sha256


def not_servable(reference: str, fault: str, param: str) -> BadRequest:
    """The refusal that names the reason."""
    return BadRequest(
        f"{param}: {reference} cannot be loaded into a running engine: {fault}",
        param=param,
        code=Code.ADAPTER_NOT_SERVABLE,
        hint='Submit {"type": "deploy", "model": …}, which merges it first, or merge it and deploy the result.',
    )


def check_free(session: Session, project_id: str, name: str) -> None:
    """A model name leads to one thing. Raises Conflict."""
    taken = repository.live_by_name(session, project_id, name)
    if taken is not None:
        ends = taken.desired == Desired.STOPPED
        raise Conflict(
            f"a deployment named {name} is {'being stopped' if ends else taken.status}",
            param="name",
            code=Code.NAME_TAKEN,
            hint="Try again in a moment." if ends else f"Choose another name, or DELETE /deployments/{taken.id} first.",
        )
    found = loaded.by_name(session, project_id, name)
    if found is not None:
        raise Conflict(
            f"an adapter named {name} is on the deployment {found[1].name}",
            param="name",
            code=Code.NAME_TAKEN,
            hint=f"Choose another name, or DELETE /deployments/{found[1].id}/adapters/{name} first.",
        )


def attach_to(session: Session, project_id: str, deployment_id: str, adapter: Looked, key_id: str | None) -> AdapterOut:
    """``POST /deployments/{id}/adapters``. Raises NotFound beside what ``attach`` raises."""
    return AdapterOut.of(attach(session, existing(session, project_id, deployment_id), adapter, key_id))


def limits(database: Database, project_id: str, deployment_id: str) -> DeploymentOptions:
    """What the deployment's engine has room for. Raises NotFound."""
    with database.read() as session:
        row = existing(session, project_id, deployment_id)
    return DeploymentOptions.model_validate(row.options)


def detach(session: Session, project_id: str, deployment_id: str, name: str) -> None:
    """Takes it off; the name leads nowhere from now on. Raises NotFound."""
    row = existing(session, project_id, deployment_id)
    if not loaded.drop(session, row.id, name):
        raise NotFound(f"{row.name} has no adapter {name[:128]!r}", param="name")


def listing(session: Session, project_id: str, deployment_id: str) -> list[AdapterOut]:
    """By name. Raises NotFound."""
    row = existing(session, project_id, deployment_id)
    return [AdapterOut.of(entry) for entry in loaded.of(session, [row.id])[row.id]]


def existing(session: Session, project_id: str, deployment_id: str, param: str = "deployment_id") -> Deployment:
    """A deployment of the project. Raises NotFound."""
    row = repository.get(session, project_id, deployment_id)
    if row is None:
        raise NotFound(f"there is no deployment {deployment_id}", param=param)
    return row
