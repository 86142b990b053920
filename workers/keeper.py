"""What becomes of an engine while it serves: it gets the adapters that its rows ask for, sleeps unused, and retires."""

import http.client
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from app.artifacts import references
from app.db import after_commit
from app.deployments import loaded, replicas
from app.deployments.rollout import REPLACED
from app.deployments.routes import USED_SECONDS
from app.engines import EngineLaunch
from app.errors import AppError, Code
from app.models import Deployment, DeploymentAdapter, DeploymentReplica, Job, now
from app.states import DEPLOYMENT_LIVE, AdapterState, DeploymentState
from workers.replica import UnixConnection
from workers.sleep_mode import Refused
from workers.supervisor import House

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0
"""A ring of the doorbell makes it sooner."""
LOAD_SECONDS = 120.0
PROBE_SECONDS = 120.0
ROUTES_LAST = 2.0
"""A gateway asks the database again after a second."""
DRAIN_SECONDS = 600.0
"""How long an engine that was replaced may finish what it was asked."""
SAME = 1e-4
"""Log-probabilities that lie closer are equal: more than rounding in float32, less than a step of training."""
_PROBE = {
    "prompt": "Question: What is the capital of France, and what is 12 + 30?\nAnswer:",
    "max_tokens": 8,
    "temperature": 0,
    "logprobs": 1,
}

Note = Callable[[str, str, str], None]
"""Code, message and level of an event of the replica."""


class EngineGone(Exception):
    """The engine does not answer: whoever watches it sees to that."""


class Keeper(threading.Thread):
    """Loads and unloads, from the engine's first answer to its end. Rows are the wish; the engine is made to follow.

    What is kept loaded are the ``max_adapters`` that were used most recently; the others are put away, and a request
    for one of them brings it back.
    """

    def __init__(
        self,
        house: House,
        job: Job,
        deployment_id: str,
        launch: EngineLaunch,
        busy: Sequence[str],
        note: Note,
        end: Callable[[], None],
        lie_down: Callable[[], str] | None = None,
        has: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(name=f"keeper-{job.id[4:12]}", daemon=True)
        self._house = house
        self._job = job
        self._deployment_id = deployment_id
        self._socket = str(launch.socket)
        self._base = launch.served_name
        self._loads = bool(launch.options.hot_load)
        self._room = launch.options.max_adapters
        self._idle_timeout = launch.options.idle_timeout
        self._busy = tuple(busy)
        self._note = note
        self._end = end
        self._lie_down = lie_down
        self._used_at: datetime | None = None
        self._quiet_since = time.monotonic()
        self._retired_at: float | None = None
        self.slept = False
        """Whether it was this that ended the engine, or put it to sleep."""
        self.parked = False
        """Whether the engine sleeps and lives on."""
        self._loaded: dict[str, str] = dict(has or {})
        self._declined: set[tuple[str, str]] = set()
        """Adapters that this engine could not load and another one has."""
        self._plain: list[tuple[str, float]] | None = None
        self._bell = threading.Event()
        self._over = threading.Event()

    def run(self) -> None:
        """Until ``stop``."""
        self._house.listeners.add(self._bell)
        try:
            while not self._over.is_set():
                self._bell.clear()
                try:
                    self.sync()
                except (SQLAlchemyError, EngineGone) as error:
                    log.warning("%s: %r; tried again", self.name, error)
                except Exception:
                    log.exception("%s: a step failed", self.name)
                self._bell.wait(POLL_SECONDS)
        finally:
            self._house.listeners.discard(self._bell)

    @property
    def loaded(self) -> Mapping[str, str]:
        """Adapters that the engine has: their names, and the pinned reference of each."""
        return dict(self._loaded)

    def stop(self) -> None:
        """No further step; one that is under way ends by itself, with the engine's end at the latest."""
        self._over.set()
        self._bell.set()

    def sync(self) -> None:
        """One round: let go of what is not wanted, put away what is too much, load what is missing; sleep when idle.

        Raises EngineGone.
        """
        with self._house.database.read() as session:
            deployment = session.get(Deployment, self._deployment_id)
            own = session.get(DeploymentReplica, self._job.id)
            rows = loaded.of(session, [self._deployment_id])[self._deployment_id]
            asked = session.get_one(Job, self._job.id).preempt_for is not None
        if deployment is None or own is None or own.status not in DEPLOYMENT_LIVE:
            return
        if own.retiring:
            self._retire()
            return
        if self._loads:
            self._follow(rows, own.loaded)
        patience: list[float] = [self._idle_timeout] if self._idle_timeout is not None else []
        patience += [self._house.settings.yield_idle_seconds] if asked else []
        if self._is_idle(deployment.used_at, min(patience, default=math.inf)):
            self._sleep()

    def _follow(self, rows: Sequence[DeploymentAdapter], known: Mapping[str, str]) -> None:
        wanted = [row for row in rows if row.status in (AdapterState.WAITING, AdapterState.READY)]
        wanted.sort(key=_recency, reverse=True)
        kept, spare = wanted[: self._room], wanted[self._room :]
        models = {row.name: row.model for row in kept}
        for row in spare:
            self._settle(row, AdapterState.EVICTED)
        for name in [name for name, model in self._loaded.items() if models.get(name) != model]:
            self._unload(name)
        for row in kept:
            if self._over.is_set():
                return
            if row.name in self._loaded and row.name not in known:
                self._has(row)  # it slept with the engine
            elif row.name not in self._loaded and (row.name, row.model) not in self._declined:
                self._load(row)

    def _is_idle(self, used_at: datetime | None, seconds: float) -> bool:
        """For so long, by this process's own clock: since the note of the last use changed, or since something ran."""
        if used_at != self._used_at:
            self._used_at, self._quiet_since = used_at, time.monotonic()
        # A use shortly after one that was noted is not noted.
        return time.monotonic() - self._quiet_since >= seconds + USED_SECONDS and not self._runs()

    def _runs(self) -> bool:
        """Whether the engine answers somebody now, by its own word."""
        status, text = self._ask("GET", "/metrics", None, PROBE_SECONDS)
        lines = str(text).splitlines() if status == 200 else []
        values = [float(line.rsplit(None, 1)[-1]) for line in lines if line.startswith(self._busy)]
        if not values or sum(values) > 0:
            self._quiet_since = time.monotonic()
            return True
        return False

    def _retire(self) -> None:
        """Nobody is led here any more; what is being answered is finished, and then the job is cancelled."""
        if self._retired_at is None:
            self._retired_at = time.monotonic()
        waited = time.monotonic() - self._retired_at
        if waited < ROUTES_LAST or (waited < DRAIN_SECONDS and self._runs()):
            return
        with self._house.database.write() as session:
            replicas.lock(session, self._deployment_id)
            own = session.get(DeploymentReplica, self._job.id)
            if own is not None:
                replicas.stop(session, own, REPLACED)
        self._over.set()

    def _sleep(self) -> None:
        """Nobody is led here any more; then the engine sleeps or ends."""
        with self._house.database.write() as session:
            self.slept = replicas.move(
                session,
                self._job.id,
                DeploymentState.SLEEPING,
                only_from=[DeploymentState.READY],
                unused_since=self._used_at,
                socket=None,
            )
        if self.slept:
            # Who was told the way a moment ago still comes; what is being answered then is finished.
            self._over.wait(ROUTES_LAST)
            self.parked = self._lies_down()
            if not self.parked:
                self._end()
            self._over.set()

    def _lies_down(self) -> bool:
        """Whether the engine could stay, without its GPU's memory."""
        if self._lie_down is None:
            return False
        try:
            self._note("engine_parked", self._lie_down(), "info")
        except Refused as error:
            self._note("engine_not_parked", f"The engine ends instead of sleeping: {error}.", "warn")
            return False
        except Exception:  # whatever it is, no engine stays that nobody keeps
            log.exception("%s: the engine could not be put to sleep", self.name)
            return False
        return True

    def _load(self, row: DeploymentAdapter) -> None:
        try:
            folder = self._folder(row)
        except AppError as error:
            self._refused(row, error.message)
            return
        status, answer = self._post("/v1/load_lora_adapter", {"lora_name": row.name, "lora_path": str(folder)})
        if status != 200:
            self._refused(row, _message(answer))
            return
        self._loaded[row.name] = row.model
        if not self._has(row):
            return  # taken off meanwhile; the next round unloads it
        self._note("adapter_loaded", f"The adapter {row.name} is loaded.", "info")
        self._look_for_effect(row)

    def _has(self, row: DeploymentAdapter) -> bool:
        """The engine has it: False when its row was taken away meanwhile."""
        with self._house.database.write() as session:
            after_commit(session, self._house.doorbell.ring)  # a replacement may wait for this
            replicas.has_loaded(session, self._job.id, row.name, row.model)
            return loaded.move(session, row, AdapterState.READY, loaded_at=now(), error=None)

    def _folder(self, row: DeploymentAdapter) -> Path:
        """Where its files lie, as they were published. Raises AppError."""
        with self._house.database.read() as session:
            found = references.resolve(session, self._house.settings, row.project_id, row.model, param="adapter")
        if found.folder is None:
            raise AppError("its files are gone")
        storage = self._house.storage
        if found.artifact is not None:
            faults = storage.verify(found.artifact.id, sha256=found.artifact.sha256)
        elif found.folder.is_relative_to(storage.root):
            faults = storage.checkpoint_faults(found.folder)
        else:
            faults = []
        if faults:
            raise AppError(f"not as published: {', '.join(faults[:3])}")
        return found.folder

    def _look_for_effect(self, row: DeploymentAdapter) -> None:
        """Whether the adapter changes anything: the same question to it and to the base."""
        if self._plain is None:
            self._plain = self._answer(self._base)
        own = self._answer(row.name)
        if self._plain is None or own is None:
            self._note("adapter_not_probed", f"The adapter {row.name} did not answer the question of a probe.", "warn")
            return
        differs = differ(self._plain, own)
        self._settle(row, AdapterState.READY, effect=differs)
        if not differs:
            message = f"The adapter {row.name} has no effect: it answers as {self._base} does, to the last digit."
            self._note("adapter_without_effect", message, "warn")

    def _answer(self, model: str) -> list[tuple[str, float]] | None:
        status, answer = self._post("/v1/completions", {"model": model, **_PROBE}, PROBE_SECONDS)
        try:
            found = answer["choices"][0]["logprobs"]
            return list(zip(found["tokens"], found["token_logprobs"], strict=True)) if status == 200 else None
        except (KeyError, IndexError, TypeError, ValueError):
            return None

    def _unload(self, name: str) -> None:
        status, answer = self._post("/v1/unload_lora_adapter", {"lora_name": name})
        if status not in (200, 404):
            log.warning("%s: %s was not unloaded: %s", self.name, name, _message(answer))
            return
        del self._loaded[name]
        with self._house.database.write() as session:
            replicas.has_loaded(session, self._job.id, name, None)
        self._note("adapter_unloaded", f"The adapter {name} is no longer loaded.", "info")

    def _refused(self, row: DeploymentAdapter, reason: str) -> None:
        error = {"code": str(Code.ADAPTER_NOT_SERVABLE), "message": reason[:2000]}
        with self._house.database.read() as session:
            others = replicas.of(session, [self._deployment_id])[self._deployment_id]
        # While another engine has it, its name goes on leading there.
        served = any(one.loaded.get(row.name) == row.model and one.id != self._job.id for one in others)
        if served:
            self._declined.add((row.name, row.model))
        if served or self._settle(row, AdapterState.FAILED, error=error):
            self._note("adapter_failed", f"The adapter {row.name} could not be loaded: {reason[:1000]}", "error")

    def _settle(self, row: DeploymentAdapter, to: AdapterState, **values: Any) -> bool:
        with self._house.database.write() as session:
            return loaded.move(session, row, to, **values)

    def _post(self, path: str, body: dict[str, Any], timeout: float = LOAD_SECONDS) -> tuple[int, Any]:
        return self._ask("POST", path, json.dumps(body), timeout)

    def _ask(self, method: str, path: str, body: str | None, timeout: float) -> tuple[int, Any]:
        connection = UnixConnection(self._socket, timeout)
        try:
            connection.request(method, path, body, {"content-type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineGone(repr(error)) from error
        finally:
            connection.close()
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, text.decode(errors="replace")


def differ(one: Sequence[tuple[str, float]], other: Sequence[tuple[str, float]]) -> bool:
    """Whether two greedy answers, as tokens with their log-probabilities, are not the same to within ``SAME``."""
    if [token for token, _ in one] != [token for token, _ in other]:
        return True
    return any(abs(mine - its) > SAME for (_, mine), (_, its) in zip(one, other, strict=True))


def _recency(row: DeploymentAdapter) -> datetime:
    return max(row.used_at or row.created_at, row.created_at)


def _message(answer: Any) -> str:
    """What an engine's error object says."""
    error = answer.get("error") if isinstance(answer, dict) else None
    return str(error.get("message")) if isinstance(error, dict) else str(answer)[:500]
