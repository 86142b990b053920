"""What can be done with deployments: start, stop, find the engine that serves a name."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from app.artifacts import inspect, references
from app.catalog import Catalog
from app.deployments import hotload, loaded, replicas, repository, rollout
from app.deployments.adapters import Looked, attach, check_adapters_fit, check_free, existing
from app.deployments.routes import Route, Router
from app.deployments.schemas import DeploymentChange, DeploymentIn, DeploymentOut
from app.errors import BadRequest, Code, Conflict
from app.jobs import live
from app.models import Deployment, DeploymentAdapter, new_id
from app.paging import Page, page_of
from app.settings import Settings
from app.specs import DeploymentOptions
from app.states import DEPLOYMENT_LIVE, DeploymentState, Desired, JobState

__all__ = ["Route", "Router"]


def create(
    session: Session,
    settings: Settings,
    catalog: Catalog,
    *,
    project_id: str,
    key_id: str | None,
    name: str,
    model: str,
    options: DeploymentOptions,
    adapters: Sequence[Looked] = (),
) -> Deployment:
    """A deployment and the job of its first replica. Raises Conflict when a name is served already."""
    catalog.check_engine(options)
    if adapters and options.task == "embed":
        raise BadRequest(
            "adapters: an engine for embeddings loads none",
            param="adapters",
            code=Code.CONFLICTING_FIELDS,
            hint="Merge the adapter, and deploy the result with task: embed.",
        )
    check_free(session, project_id, name)
    found = references.resolve(session, settings, project_id, model, param="model")
    check_servable(found)
    kept = options.model_dump(mode="json", include=set(DeploymentOptions.model_fields))
    if options.hot_load is None:
        kept["hot_load"] = options.task != "embed" and (bool(adapters) or hotload.is_base(session, found))
    row = Deployment(
        id=new_id("dep"),
        project_id=project_id,
        created_by=key_id,
        name=name,
        model=found.pinned,
        artifact_id=found.artifact.id if found.artifact else None,
        options=kept,
    )
    session.add(row)
    session.flush()
    for number, adapter in enumerate(adapters):
        attach(session, row, adapter, key_id, param=f"adapters.{number}.adapter")
    for _ in range(options.replicas):
        replicas.add(session, row, row.generation, row.model, row.artifact_id, kept)
    return row


def check_servable(found: references.Resolved) -> None:
    """A deployment serves a whole model that exists already."""
    if found.job_id:
        raise BadRequest(
            f"model: {found.job_id} has not finished",
            param="model",
            code=Code.MODEL_NOT_FOUND,
            hint="Wait for it, or submit a deploy job, which waits by itself.",
        )
    if found.folder is None:
        raise BadRequest(
            f"model: {found.hub} is not on this machine",
            param="model",
            code=Code.MODEL_NOT_FOUND,
            hint="Name a registered model (GET /artifacts lists them), or import this one first.",
        )
    if inspect.looks_like_adapter(found.folder):
        raise BadRequest(
            "model: this is an adapter, and a deployment serves a whole model",
            param="model",
            code=Code.MODEL_INVALID,
            hint="Name its base as model and the adapter among adapters, or submit a deploy job.",
        )
    inspect.read_json(found.folder / "config.json", "model")


def stop(session: Session, project_id: str, deployment_id: str) -> DeploymentOut:
    """Asks for the end; an engine that runs is stopped by its worker. Stopping twice is fine."""
    row = existing(session, project_id, deployment_id)
    if row.status in DEPLOYMENT_LIVE:
        replicas.lock(session, row.id)
        row.desired = Desired.STOPPED
        session.flush()
        for replica in replicas.of(session, [row.id])[row.id]:
            replicas.stop(session, replica)
        replicas.settle(session, row)
    session.refresh(row)
    return _shown(session, "", [row])[0]


def change(
    session: Session,
    settings: Settings,
    catalog: Catalog,
    project_id: str,
    deployment_id: str,
    body: DeploymentChange,
) -> DeploymentOut:
    """``PATCH /deployments/{id}``: another number of engines at once, all else by new engines that take over.

    Raises NotFound, BadRequest; Conflict for a deployment that is over, and for one whose adapters would not fit.
    """
    existing(session, project_id, deployment_id)
    row = replicas.lock(session, deployment_id)
    assert row is not None
    if row.desired == Desired.STOPPED or row.status not in DEPLOYMENT_LIVE:
        raise Conflict(f"the deployment is {row.status}", hint="Start it again with POST /deployments.")
    wished = row.coming or {"model": row.model, "artifact_id": row.artifact_id, "options": row.options}
    fields = body.model_fields_set & set(DeploymentOptions.model_fields)
    options = {**wished["options"], **body.model_dump(mode="json", include=fields)}
    if options.get("hot_load") is None:
        options["hot_load"] = wished["options"]["hot_load"]
    if options.get("task") == "embed" and "hot_load" not in fields:
        options["hot_load"] = False
    catalog.check_engine(DeploymentOptions.model_validate(options))
    model, artifact_id = wished["model"], wished["artifact_id"]
    if body.model is not None:
        found = references.resolve(session, settings, project_id, body.model, param="model")
        check_servable(found)
        model, artifact_id = found.pinned, found.artifact.id if found.artifact else None
    check_adapters_fit(session, row, model, artifact_id, options)
    changed = {name for name in options if options[name] != wished["options"].get(name)}
    if model != wished["model"] or changed - {"replicas"} or (changed and row.coming):
        rollout.begin(session, row, model, artifact_id, options)
    elif row.coming is None and "replicas" in fields:
        # Also when that many were asked for before: one that gave up gets a successor.
        rollout.scale(session, row, options["replicas"])
    session.refresh(row)
    return _shown(session, settings.base_url, [row])[0]


def has_orphans(session: Session) -> bool:
    """Whether ``settle_orphans`` has something to do."""
    return session.execute(replicas.orphans().limit(1)).first() is not None


def settle_orphans(session: Session) -> None:
    """A replica whose job is final serves nothing any more, however it came to that."""
    for replica, job in session.execute(replicas.orphans()).all():
        if job.state == JobState.FAILED and not replica.retiring:
            error = {"code": job.error_code, **(job.error_detail or {})}
            replicas.move(session, replica.id, DeploymentState.FAILED, last_error=error)
        else:
            replicas.move(session, replica.id, DeploymentState.STOPPED)


def show(session: Session, settings: Settings, project_id: str, deployment_id: str) -> DeploymentOut:
    """One deployment. Raises NotFound."""
    return _shown(session, settings.base_url, [existing(session, project_id, deployment_id)])[0]


def listing(
    session: Session, settings: Settings, project_id: str, limit: int, after: str | None
) -> Page[DeploymentOut]:
    """Newest first."""
    cursor = existing(session, project_id, after, "after") if after else None
    rows = repository.page(session, project_id, limit, cursor)
    return page_of(_shown(session, settings.base_url, rows), limit, [row.id for row in rows])


def _shown(session: Session, base_url: str, rows: Sequence[Deployment]) -> list[DeploymentOut]:
    ids = [row.id for row in rows]
    adapters, engines = loaded.of(session, ids), replicas.of(session, ids)
    return [DeploymentOut.of(row, base_url, adapters[row.id], engines[row.id]) for row in rows]


def create_from(
    session: Session,
    settings: Settings,
    catalog: Catalog,
    project_id: str,
    key_id: str,
    body: DeploymentIn,
    adapters: Sequence[Looked],
) -> DeploymentOut:
    """``POST /deployments``."""
    row = create(
        session,
        settings,
        catalog,
        project_id=project_id,
        key_id=key_id,
        name=body.name,
        model=body.model,
        options=body,
        adapters=adapters,
    )
    return _shown(session, settings.base_url, [row])[0]


def served_models(session: Session, project_id: str) -> list[dict[str, Any]]:
    """What ``/v1/models`` lists: what has a name and is served or about to be, and runs in training.

    An adapter has a parent, and a run its job as root.
    """
    training = [
        {
            "id": f"{job.experiment_name}{live.SUFFIX}",
            "object": "model",
            "created": int(job.created_at.timestamp()),
            "owned_by": job.project_id,
            "root": job.id,
            "parent": None,
            "status": "training",
        }
        for job in live.in_training(session, project_id)
    ]
    entries: list[tuple[Deployment | DeploymentAdapter, str | None, str]] = [
        (row, None, row.status) for row in repository.live(session, project_id)
    ]
    for adapter, row in loaded.live(session, project_id):
        answers = row.status in (DeploymentState.READY, DeploymentState.UNHEALTHY)
        entries.append((adapter, row.name, adapter.status if answers else row.status))
    return training + [
        {
            "id": row.name,
            "object": "model",
            "created": int(row.created_at.timestamp()),
            "owned_by": row.project_id,
            "root": row.model,
            "parent": parent,
            "status": status,
        }
        for row, parent, status in entries
    ]
