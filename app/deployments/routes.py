"""From a model name to the engine that answers to it; for the gateway."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import update
from sqlalchemy.exc import SQLAlchemyError

from app.db import Database, after_commit
from app.deployments import checkpoints, loaded, replicas, repository
from app.errors import AppError, Code, Conflict, NotFound, Unavailable
from app.jobs import live
from app.models import Deployment, DeploymentAdapter, DeploymentReplica, now
from app.settings import Settings
from app.states import AdapterState, DeploymentState

USED_SECONDS = 5.0
"""How exactly it is stored when a model was last used: never a write a request."""


@dataclass(frozen=True)
class Target:
    """An engine: the id of its replica, or of the run that answers itself, and where it listens."""

    id: str
    socket: str


@dataclass(frozen=True)
class Route:
    """Where requests for a model name go: to any of the targets, oldest first."""

    targets: tuple[Target, ...]
    served_name: str
    deployment_id: str
    generation: int = 1
    adapter: str | None = None
    """The pinned reference of the adapter that answers there; None: the deployment's own model."""


class Router:
    """Finds the engine that serves a name; asks for what was put away. ``ring`` wakes who brings it back.

    With ``settings``, checkpoints of runs are found as well.
    """

    def __init__(
        self, database: Database, ring: Callable[[], None] = lambda: None, settings: Settings | None = None
    ) -> None:
        self._database = database
        self._ring = ring
        self._settings = settings

    def route_for(self, model: str, project_id: str) -> Route:
        """Raises NotFound for a name that nobody serves, Unavailable while its engine starts or its adapter loads.

        Unavailable of code ``model_waking`` is worth waiting for: what was asked is on its way back.
        Raises Conflict for an adapter that its engine could not load.
        """
        if model.endswith(live.SUFFIX) and self._settings is not None:
            return self._to_a_run(model, project_id, self._settings)
        with self._database.read() as session:
            row = repository.live_by_name(session, project_id, model)
            found = loaded.by_name(session, project_id, model) if row is None else None
        if row is not None:
            self._used(row)
            return Route(_targets(self._engines(row, row.name)), row.name, row.id, row.generation)
        if found is not None:
            return self._to_adapter(*found)
        if self._settings is not None:
            base = checkpoints.ask_for(self._database, self._settings, project_id, model)
            if base is not None:
                self._engines(base, model)
                self._ring()
                raise waking(model)
        raise NotFound(
            f"the model {model[:128]!r} is not being served",
            param="model",
            code=Code.MODEL_NOT_FOUND,
            hint="GET /v1/models lists what is; POST /deployments starts more.",
        )

    def _to_a_run(self, model: str, project_id: str, settings: Settings) -> Route:
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
        socket = live.live_socket(settings, found[0])
        if not socket.exists():
            raise Unavailable(
                f"the run {name} has not begun its steps, or cannot answer between them",
                retry_after=5,
                code=Code.MODEL_NOT_READY,
                hint="Its events tell how far it is.",
            )
        return Route((Target(found[0], str(socket)),), model, found[0])

    def _to_adapter(self, adapter: DeploymentAdapter, row: Deployment) -> Route:
        if adapter.status == AdapterState.FAILED:
            raise Conflict(
                f"the adapter {adapter.name} could not be loaded: {(adapter.error or {}).get('message')}",
                param="model",
                code=Code.ADAPTER_NOT_SERVABLE,
                hint="Merge it and deploy the result.",
            )
        self._used(row)
        self._used(adapter)
        if adapter.status == AdapterState.EVICTED:
            with self._database.write() as session:
                loaded.move(session, adapter, AdapterState.WAITING, only_from=[AdapterState.EVICTED], used_at=now())
            self._ring()
        engines = self._engines(row, adapter.name)
        having = [one for one in engines if one.loaded.get(adapter.name) == adapter.model]
        if adapter.status != AdapterState.READY or not having:
            raise waking(adapter.name)
        return Route(_targets(having), adapter.name, row.id, row.generation, adapter.model)

    def _engines(self, row: Deployment, model: str) -> Sequence[DeploymentReplica]:
        """Those that answer; what sleeps is woken. Raises Unavailable while there is none."""
        with self._database.read() as session:
            every = replicas.of(session, [row.id])[row.id]
        found = replicas.answering(row, every)
        if found:
            return found
        if any(one.status == DeploymentState.SLEEPING for one in every):
            with self._database.write() as session:
                replicas.wake(session, row)
            self._ring()
            raise waking(model)
        # One that sleeps at times is on its way back within a start's time.
        slept = row.options.get("idle_timeout") is not None and row.ready_at is not None
        if not slept:
            with self._database.read() as session:
                slept = replicas.wakes(session, every)
        raise waking(model) if slept else _not_ready(row)

    def _used(self, row: Deployment | DeploymentAdapter) -> None:
        if row.used_at is not None and now() - row.used_at < timedelta(seconds=USED_SECONDS):
            return
        if isinstance(row, Deployment):
            query = update(Deployment).where(Deployment.id == row.id)
        else:
            own = (DeploymentAdapter.deployment_id == row.deployment_id, DeploymentAdapter.name == row.name)
            query = update(DeploymentAdapter).where(*own)
        # The answer matters more than the note: a database that is busy must not refuse a chat.
        with suppress(SQLAlchemyError), self._database.write() as session:
            session.execute(query.values(used_at=now()))
            # Of several engines some may have gone to sleep before this use was noted.
            if isinstance(row, Deployment) and replicas.wake(session, row):
                after_commit(session, self._ring)


def _targets(engines: Sequence[DeploymentReplica]) -> tuple[Target, ...]:
    """Those that are well; while none is, those that missed a probe."""
    well = [one for one in engines if one.status == DeploymentState.READY]
    return tuple(Target(one.id, one.socket) for one in well or engines if one.socket is not None)


def waking(model: str) -> Unavailable:
    """What was put away is being brought back."""
    return Unavailable(
        f"the model {model[:128]} is being loaded", retry_after=5, code=Code.MODEL_WAKING, hint="Try again soon."
    )


def _not_ready(row: Deployment) -> AppError:
    return Unavailable(
        f"the model {row.name} is {row.status}", retry_after=5, code=Code.MODEL_NOT_READY, hint="Try again soon."
    )
