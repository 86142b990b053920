"""A deployment under real supervision with a fake engine in it: shared by the tests of serving."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.db import Database
from app.deployments.routes import Router
from app.discovery import discover
from app.jobs import claims
from app.models import JobEvent, Slot, Worker
from app.processes import kill_holders_of_slot, processes_with_token
from app.queue import SilentDoorbell
from app.settings import Settings
from app.storage import Storage
from tests.artifacts import publish
from tests.support import make_lora_folder, make_model_folder, wait_for
from workers import replicas
from workers.child import token_of
from workers.replica import UnixConnection
from workers.replicas import ReplicaSupervision
from workers.supervisor import House

PROJECT = "proj-default"
SLOTS = ("serve-0", "serve-1")


@pytest.fixture
def backend() -> str:
    """The rows' moves are tested on every database; here it is about an engine."""
    return "sqlite"


@pytest.fixture
def house(settings: Settings, database: Database, storage: Storage, key: str) -> Iterator[House]:
    with database.write() as session:
        session.add(Worker(id="w1", host="h", pid=os.getpid()))
        session.flush()
        session.add_all(Slot(worker_id="w1", slot_id=slot, slot_class="serve") for slot in SLOTS)
    house = House(settings, database, storage, discover(("tests.plugs",)), SilentDoorbell(), "w1", threading.Event())
    yield house
    house.stopping.set()
    for slot in SLOTS:
        kill_holders_of_slot(settings.instance, slot)


@pytest.fixture
def mode() -> str:
    """How the engine behaves: see tests/workers/fake_engine.py."""
    return "ok"


@pytest.fixture
def base(database: Database, storage: Storage, key: str, tmp_path: Path, mode: str) -> str:
    folder = make_model_folder(tmp_path / "base")
    (folder / "mode.txt").write_text(mode)
    return publish(database, storage, folder, "base", "model")


@pytest.fixture
def adapter(database: Database, storage: Storage, base: str, tmp_path: Path) -> Callable[..., str]:
    """``adapter(name, *files)``: an artifact, with files of these names in it."""

    def adapter(name: str, *files: str) -> str:
        folder = make_lora_folder(tmp_path / name)
        for file in files:
            (folder / file).touch()
        return publish(database, storage, folder, name, "adapter", base=f"artifact:{base}")

    return adapter


class Serving:
    """A deployment whose replica is claimed and supervised by threads of this process, again and again."""

    def __init__(
        self, api: TestClient, house: House, before: Callable[[str], object] = lambda _: None, **body: Any
    ) -> None:
        """``before``: is told the id of the replica before anybody claims it."""
        self.api = api
        self.house = house
        self.router = Router(house.database, self.ring)
        answer = api.post("/deployments", json={"name": "plain", "engine": "pretend", **body})
        assert answer.status_code == 201, answer.text
        self.id = answer.json()["id"]
        self.job_id = answer.json()["replicas"][0]["id"]
        before(self.job_id)
        self.tokens: list[str] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._serve, args=(slot,)) for slot in SLOTS]
        for thread in self._threads:
            thread.start()

    @property
    def token(self) -> str:
        """Of the attempt that began last."""
        return self.tokens[-1]

    def _serve(self, slot: str) -> None:
        while not self._over.is_set():
            with self.house.database.write() as session:
                job = claims.claim(session, "w1", slot, ["serve"])
            if job is not None:
                self.tokens.append(token_of(self.house.settings, job, slot))
                ReplicaSupervision(self.house, job, slot).run()
            self._over.wait(0.05)

    def ring(self) -> None:
        for bell in tuple(self.house.listeners):
            bell.set()

    def shown(self) -> dict[str, Any]:
        shown: dict[str, Any] = self.api.get(f"/deployments/{self.id}").json()
        return shown

    def statuses(self) -> dict[str, str]:
        return {entry["name"]: entry["status"] for entry in self.shown()["adapters"]}

    def ready(self, *names: str) -> None:
        """Waits until the deployment and these adapters of it answer."""
        wait_for(lambda: self.shown()["status"] == "ready")
        wait_for(lambda: self.ring() or all(self.statuses().get(name) == "ready" for name in names))

    def add(self, adapter: str, **fields: Any) -> Any:
        answer = self.api.post(f"/deployments/{self.id}/adapters", json={"adapter": adapter, **fields})
        self.ring()
        return answer

    def asks(self, model: str) -> int:
        """The status of a completion by the route that the gateway would take."""
        route = self.router.route_for(model, PROJECT)
        connection = UnixConnection(route.targets[0].socket, 5)
        connection.request("POST", "/v1/completions", json.dumps({"model": route.served_name, "prompt": "x"}))
        status = connection.getresponse().status
        connection.close()
        return status

    def engines(self) -> list[int]:
        """Pids of the engines of all its attempts; what an engine forked has a group of its own or the engine's."""
        found = [pid for token in tuple(self.tokens) for pid in processes_with_token(token)]
        return [pid for pid in found if _is_engine(pid)]

    def codes(self) -> list[str]:
        with self.house.database.read() as session:
            query = select(JobEvent.code).where(JobEvent.job_id == self.job_id).order_by(JobEvent.seq)
            return list(session.scalars(query))

    def close(self) -> None:
        self._over.set()
        self.api.delete(f"/deployments/{self.id}")
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        assert [pid for token in self.tokens for pid in processes_with_token(token)] == []


def _is_engine(pid: int) -> bool:
    try:
        return os.getpgid(pid) == pid and "fake_engine" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine is looked at several times a second instead of four times a minute."""
    plain = replicas._attempt
    quick = {"probe_seconds": 0.2, "probe_timeout": 0.5, "busy_seconds": 2.0}
    monkeypatch.setattr(replicas, "_attempt", lambda *given: plain(*given) | quick)


@pytest.fixture
def serve(
    api: TestClient, house: House, base: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Serving]]:
    monkeypatch.setattr(replicas, "BACKOFF", (0.1,))
    made: list[Serving] = []

    def serve(**body: Any) -> Serving:
        made.append(Serving(api, house, **{"model": f"artifact:{base}", **body}))
        return made[-1]

    yield serve
    for serving in made:
        serving.close()
