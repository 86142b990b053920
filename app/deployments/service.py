"""What can be done with deployments: start, stop, find the engine that serves a name."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app.artifacts import inspect, references
from app.catalog import Catalog
from app.db import Database
from app.deployments import repository
from app.deployments.schemas import DeploymentIn, DeploymentOut
from app.errors import BadRequest, Code, Conflict, NotFound, Unavailable
from app.jobs import live
from app.jobs import repository as jobs
from app.jobs.repository import Move
from app.models import Deployment, Job, new_id, now
from app.paging import Page, page_of
from app.settings import Settings
from app.specs import DeploymentOptions, ServeSpec
from app.states import DeploymentState, Desired, JobState

_MAX_RESTARTS = 10_000  # a replica's attempts are counted on its deployment


@dataclass(frozen=True)
class Route:
    """Where requests for a model name go."""

    socket: str
    served_name: str
    deployment_id: str


class Router:
    """Finds the engine that serves a name; for the gateway."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings

    def route_for(self, model: str, project_id: str) -> Route:
        """Raises NotFound for a name that nobody serves, Unavailable while its engine starts."""
        if model.endswith(live.SUFFIX):
            return self._live_route(model, project_id)
        with self._database.read() as session:
            row = repository.live_by_name(session, project_id, model)
        if row is None:
            raise NotFound(
                f"the model {model[:128]!r} is not being served",
                param="model",
                code=Code.MODEL_NOT_FOUND,
                hint="GET /v1/models lists what is; POST /deployments starts more.",
            )
        if row.socket is None or row.status not in (DeploymentState.READY, DeploymentState.UNHEALTHY):
            raise Unavailable(
                f"the model {model} is {row.status}", retry_after=5, code=Code.MODEL_NOT_READY, hint="Try again soon."
            )
        return Route(row.socket, row.name, row.id)

    def _live_route(self, model: str, project_id: str) -> Route:
        """To a run in training, by its id or its experiment name; of several of one name to the newest."""
        name = model.removesuffix(live.SUFFIX)
        with self._database.read() as session:
            found = [job.id for job in live.in_training(session, project_id, name)]
        if not found:
            raise NotFound(
                f"no run {name[:128]!r} is in training",
                param="model",
                code=Code.MODEL_NOT_FOUND,
                hint=f"NAME{live.SUFFIX} asks a run while it trains; NAME is its id or its experiment_name.",
            )
        socket = live.live_socket(self._settings, found[0])
        if not socket.exists():
            raise Unavailable(
                f"the run {name} has not begun its steps, or cannot answer between them",
                retry_after=5,
                code=Code.MODEL_NOT_READY,
                hint="Its events tell how far it is.",
            )
        return Route(str(socket), model, found[0])


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
) -> Deployment:
    """A deployment and the job of its first replica. Raises Conflict when the name is served already."""
    if options.engine not in catalog.engines:
        names = ", ".join(catalog.engines)
        raise BadRequest(f"engine {options.engine!r} is unknown", param="engine", hint=f"One of: {names}.")
    taken = repository.live_by_name(session, project_id, name)
    if taken is not None:
        raise Conflict(
            f"a deployment named {name} is {taken.status}",
            param="name",
            code=Code.NAME_TAKEN,
            hint=f"Choose another name, or DELETE /deployments/{taken.id} first.",
        )
    found = references.resolve(session, settings, project_id, model, param="model")
    check_servable(found)
    row = Deployment(
        id=new_id("dep"),
        project_id=project_id,
        created_by=key_id,
        name=name,
        model=found.pinned,
        artifact_id=found.artifact.id if found.artifact else None,
        options=options.model_dump(mode="json", include=set(DeploymentOptions.model_fields)),
    )
    session.add(row)
    session.flush()
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
            "model: an adapter is merged before it is served",
            param="model",
            code=Code.MODEL_INVALID,
            hint='Submit {"type": "merge", "adapter": …} and deploy its result.',
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
    row = _existing(session, project_id, deployment_id, "deployment_id")
    if row.status not in (DeploymentState.STOPPED, DeploymentState.FAILED):
        row.desired = Desired.STOPPED
        session.flush()
        stop_replica(session, row)
    session.refresh(row)
    return DeploymentOut.of(row, "")


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
    return DeploymentOut.of(_existing(session, project_id, deployment_id, "deployment_id"), settings.base_url)


def listing(
    session: Session, settings: Settings, project_id: str, limit: int, after: str | None
) -> Page[DeploymentOut]:
    """Newest first."""
    cursor = _existing(session, project_id, after, "after") if after else None
    rows = repository.page(session, project_id, limit, cursor)
    return page_of([DeploymentOut.of(row, settings.base_url) for row in rows], limit, [row.id for row in rows])


def create_from(
    session: Session, settings: Settings, catalog: Catalog, project_id: str, key_id: str, body: DeploymentIn
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
    )
    return DeploymentOut.of(row, settings.base_url)


def served_models(session: Session, project_id: str) -> list[dict[str, Any]]:
    """What ``/v1/models`` lists: everything with a name that is served or about to be, and the runs in training."""
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
    return training + [
        {
            "id": row.name,
            "object": "model",
            "created": int(row.created_at.timestamp()),
            "owned_by": row.project_id,
            "root": row.model,
            "parent": None,
            "status": row.status,
        }
        for row in repository.live(session, project_id)
    ]


def _existing(session: Session, project_id: str, deployment_id: str, param: str) -> Deployment:
    row = repository.get(session, project_id, deployment_id)
    if row is None:
        raise NotFound(f"there is no deployment {deployment_id}", param=param)
    return row
