"""What a run is told of the engines that it asks: the way as it is now, why there is none, why there will be none."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError

from app.catalog import Catalog, Served
from app.db import Database
from app.deployments import loaded, replicas, repository
from app.errors import Code, RunError
from app.models import Deployment, DeploymentAdapter, Job, new_id
from app.settings import Settings
from app.states import AdapterState, DeploymentState
from tests.deployed import engine_of, said
from tests.support import wait_for
from workers.context import SERVED, JobContext
from workers.journal import Tail
from workers.lookout import Lookout


class Run:
    """A run's end, and a lookout at the other, without a process between them."""

    def __init__(
        self, database: Database, settings: Settings, folder: Path, spec: dict[str, Any], **pinned: str
    ) -> None:
        inputs = {field.replace("_", "."): {"pinned": value} for field, value in pinned.items()}
        self.ctx = JobContext(folder, {"job_id": "j", "inputs": inputs, "spec": spec}, Catalog())
        self.file = folder / SERVED
        self.rings = 0
        job = Job(id=new_id("job"), project_id="proj-default", resolved_spec=spec)
        self.lookout = Lookout(database, settings, self.ring, job, folder, inputs)
        self.lookout.start()
        self._tail = Tail(folder / "events.jsonl")

    def ring(self) -> None:
        self.rings += 1

    def way(self, field: Any = "model") -> Served | str:
        found = self.ctx.served(field)
        self.lookout.hear(list(self._tail.read()))
        return found

    def comes_to(self, wanted: Callable[[Served | str], bool], field: Any = "model") -> Served | str:
        return wait_for(lambda: wanted(found := self.way(field)) and found, 20)


@pytest.fixture
def run(database: Database, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr("workers.lookout.POLL_SECONDS", 0.05)
    made: list[Run] = []

    def run(spec: dict[str, Any], **pinned: str) -> Run:
        folder = tmp_path / f"run{len(made)}"
        folder.mkdir()
        made.append(Run(database, settings, folder, spec, **pinned))
        return made[-1]

    yield run
    for each in made:
        each.lookout.stop()
        each.lookout.join(10)
        assert not each.lookout.is_alive()


def is_at(socket: str) -> Callable[[Served | str], bool]:
    return lambda way: isinstance(way, Served) and [str(one) for one in way.sockets] == [socket]


def move(database: Database, name: str, to: DeploymentState, **values: Any) -> None:
    with database.write() as session:
        row = repository.live_by_name(session, "proj-default", name)
        assert row is not None
        assert said(session, row.id, to, **values)


def test_the_way_follows_the_engine_until_nothing_serves_any_more(
    run: Callable[..., Run], api: TestClient, base: str, database: Database
) -> None:
    model = f"artifact:{base}"
    made = api.post("/deployments", json={"name": "plain", "model": model})
    asked = run({"deployment": "plain"}, model=model)
    assert asked.way() == "the way to its engine is being looked up"
    assert asked.comes_to(lambda way: way == "the model plain is queued")
    move(database, "plain", DeploymentState.STARTING)
    move(database, "plain", DeploymentState.READY, socket="/run/1.s")
    found = asked.comes_to(is_at("/run/1.s"))
    assert isinstance(found, Served)
    assert found.name == "plain"
    assert asked.file.stat().st_mode & 0o077 == 0
    move(database, "plain", DeploymentState.QUEUED, socket=None)
    assert asked.comes_to(lambda way: isinstance(way, str) and "queued" in way)
    move(database, "plain", DeploymentState.STARTING)
    move(database, "plain", DeploymentState.READY, socket="/run/2.s")
    assert asked.comes_to(is_at("/run/2.s"))
    with database.read() as session:
        assert session.get_one(Deployment, made.json()["id"]).used_at is not None  # it does not fall asleep meanwhile
    move(database, "plain", DeploymentState.STOPPED)
    with pytest.raises(RunError, match="'plain' is not being served") as caught:
        asked.comes_to(lambda _: False)
    assert (caught.value.code, caught.value.param, caught.value.transient) == (
        Code.MODEL_NOT_FOUND,
        "deployment",
        False,
    )


def test_a_deployment_that_was_replaced_is_not_asked(
    run: Callable[..., Run], api: TestClient, base: str, adapter: Callable[..., str], database: Database
) -> None:
    api.post("/deployments", json={"name": "plain", "model": f"artifact:{base}"})
    move(database, "plain", DeploymentState.STARTING)
    move(database, "plain", DeploymentState.READY, socket="/run/1.s")
    asked = run({"deployment": "plain"}, model=f"artifact:{adapter('a')}")
    with pytest.raises(RunError, match=f"plain serves artifact:{base}") as caught:
        asked.comes_to(lambda _: False)
    assert caught.value.code is Code.CONFLICTING_FIELDS


def test_one_that_sleeps_is_woken_and_an_adapter_that_was_put_away_is_brought_back(
    run: Callable[..., Run], api: TestClient, base: str, adapter: Callable[..., str], database: Database
) -> None:
    pinned = f"artifact:{adapter('a')}"
    body = {
        "name": "plain",
        "model": f"artifact:{base}",
        "idle_timeout": 60,
        "adapters": [{"adapter": pinned, "name": "a"}],
    }
    made = api.post("/deployments", json=body)
    assert made.status_code == 201, made.text
    move(database, "plain", DeploymentState.STARTING)
    move(database, "plain", DeploymentState.READY, socket="/run/1.s")
    with database.write() as session:
        row = session.get_one(DeploymentAdapter, (made.json()["id"], "a"))
        assert loaded.move(session, row, AdapterState.EVICTED)
    move(database, "plain", DeploymentState.SLEEPING, socket=None)
    asked = run({"deployment": "a"}, model=pinned, model_base=f"artifact:{base}")
    assert asked.comes_to(lambda way: isinstance(way, str) and "is being loaded" in way)

    def states() -> tuple[str, str]:
        with database.read() as session:
            row = session.get_one(DeploymentAdapter, (made.json()["id"], "a"))
            return session.get_one(Deployment, made.json()["id"]).status, row.status

    wait_for(lambda: states() == ("queued", "waiting"), 10)
    assert asked.rings
    move(database, "plain", DeploymentState.STARTING)
    move(database, "plain", DeploymentState.READY, socket="/run/2.s")
    # The base answers already; only what is asked now is looked for.
    base_way = asked.comes_to(is_at("/run/2.s"), "baseline")
    assert isinstance(base_way, Served)
    assert base_way.name == "plain"
    assert set(json.loads(asked.file.read_bytes())) == {"baseline"}
    with database.write() as session:
        row = session.get_one(DeploymentAdapter, (made.json()["id"], "a"))
        replicas.has_loaded(session, engine_of(session, made.json()["id"]).id, "a", pinned)
        assert loaded.move(session, row, AdapterState.READY)
    found = asked.comes_to(is_at("/run/2.s"))
    assert isinstance(found, Served)
    assert found.name == "a"


def test_a_database_that_does_not_answer_is_asked_again(
    run: Callable[..., Run], api: TestClient, base: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.post("/deployments", json={"name": "plain", "model": f"artifact:{base}"})
    looks: list[int] = []

    def names(*_: Any, **__: Any) -> list[str]:
        looks.append(1)
        if len(looks) < 3:
            raise OperationalError("select", {}, Exception("locked"))
        return ["plain"]

    monkeypatch.setattr("workers.lookout.names_for", names)
    asked = run({"deployment": "plain"}, model=f"artifact:{base}")
    assert asked.comes_to(lambda way: way == "the model plain is queued")
    assert len(looks) >= 3
