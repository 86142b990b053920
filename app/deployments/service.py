"""What can be done with deployments: start, stop, find the engine that serves a name."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from app.artifacts import inspect, references
from app.catalog import Catalog
from app.deployments import hotload, loaded, repository
from app.deployments.adapters import Looked, attach, check_free, existing
from app.deployments.routes import Route, Router
from app.deployments.schemas import DeploymentIn, DeploymentOut
from app.errors import BadRequest, Code
from app.jobs import live
from app.jobs import repository as jobs
from app.jobs.repository import Move
from app.models import Deployment, DeploymentAdapter, Job, new_id, now
from app.paging import Page, page_of
from app.settings import Settings
from app.specs import DeploymentOptions, ServeSpec
from app.states import DeploymentState, Desired, JobState

__all__ = ["Route", "Router"]
_MAX_RESTARTS = 10_000  # a replica's attempts are counted on its deployment


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
    catalog.check_engine(options.engine)
    check_free(session, project_id, name)
    found = references.resolve(session, settings, project_id, model, param="model")
    check_servable(found)
    kept = options.model_dump(mode="json", include=set(DeploymentOptions.model_fields))
    if options.hot_load is None:
        kept["hot_load"] = bool(adapters) or hotload.is_base(session, found)
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
    row.replica_job_id = _add_replica(session, row).id
    session.flush()
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


def _add_replica(session: Session, row: Deployment) -> Job:
    spec = ServeSpec.model_validate(
        {**row.options, "model": row.model, "name": row.name, "deployment_id": row.id, "experiment_name": row.name}
    ).model_dump(mode="json")
    job = Job(
        id=new_id("job"),
        project_id=row.project_id,
        created_by=row.created_by,
        type="serve",
        algorithm=None,
        experiment_name=row.name,
        spec=spec,
        spec_sha256="",
        resolved_spec=spec,
        slot_class="serve",
        max_attempts=_MAX_RESTARTS,
        deployment_id=row.id,
    )
    jobs.add(session, job)
    return job


def stop(session: Session, project_id: str, deployment_id: str) -> DeploymentOut:
    """Asks for the end; an engine that runs is stopped by its worker. Stopping twice is fine."""
    row = existing(session, project_id, deployment_id)
    if row.status not in (DeploymentState.STOPPED, DeploymentState.FAILED):
        row.desired = Desired.STOPPED
        session.flush()
        stop_replica(session, row)
    session.refresh(row)
    return _shown(session, "", [row])[0]


def stop_replica(session: Session, row: Deployment) -> None:
    """Cancels the replica's job, at once if it only waits."""
    replica = session.get(Job, row.replica_job_id) if row.replica_job_id else None
    if replica is None or JobState(replica.state).terminal:
        repository.transition(session, row.id, DeploymentState.STOPPED)
        return
    cancelled = Move(JobState.CANCELLED, "job_cancelled", "The deployment was stopped.")
    if jobs.transition(session, replica.id, JobState.QUEUED, cancelled):
        repository.transition(session, row.id, DeploymentState.STOPPED)
        return
    asked = Move(
        JobState.RUNNING, "cancel_requested", "The deployment is being stopped.", values={"cancel_requested_at": now()}
    )
    jobs.note(session, replica.id, asked, Job.state == JobState.RUNNING, Job.cancel_requested_at.is_(None))


def has_orphans(session: Session) -> bool:
    """Whether ``settle_orphans`` has something to do."""
    return session.execute(repository.orphans().limit(1)).first() is not None


def settle_orphans(session: Session) -> None:
    """A deployment whose replica's job is final serves nothing any more, however it came to that."""
    for row, replica in session.execute(repository.orphans()).all():
        if replica.state == JobState.FAILED and row.desired != Desired.STOPPED:
            error = {"code": replica.error_code, **(replica.error_detail or {})}
            repository.transition(session, row.id, DeploymentState.FAILED, replica=replica.id, last_error=error)
        else:
            repository.transition(session, row.id, DeploymentState.STOPPED, replica=replica.id)


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
    adapters = loaded.of(session, [row.id for row in rows])
    return [DeploymentOut.of(row, base_url, adapters[row.id]) for row in rows]


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
