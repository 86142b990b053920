"""Engines under supervision that are replaced: what they were asked is finished, and nothing is left of them."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from app.deployments.rollout import Rollouts
from app.models import DeploymentReplica
from app.processes import processes_with_token
from app.queue import SilentDoorbell
from app.storage import Storage
from tests.artifacts import publish
from tests.deployed import engine_of
from tests.support import make_model_folder, wait_for
from tests.workers.serving.conftest import PROJECT, Serving
from workers.supervisor import House


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.keeper.POLL_SECONDS", 0.1)
    monkeypatch.setattr("workers.keeper.ROUTES_LAST", 0.2)


@pytest.fixture
def step(house: House) -> Callable[[], bool]:
    """A step of the reconciler; True, to stand in a wait."""
    rollouts = Rollouts(house.database, SilentDoorbell())

    def step() -> bool:
        rollouts.tick()
        return True

    return step


@pytest.fixture
def broken(house: House, storage: Storage, tmp_path: Path) -> str:
    """A model whose engine dies at once."""
    folder = make_model_folder(tmp_path / "broken")
    (folder / "mode.txt").write_text("exits")
    return publish(house.database, storage, folder, "broken", "model")


def replicas(serving: Serving) -> list[tuple[int, str, bool]]:
    return [(one["generation"], one["status"], one["retiring"]) for one in serving.shown()["replicas"]]


def test_the_old_one_finishes_what_it_was_asked_and_ends(
    serve: Callable[..., Serving], adapter: Callable[..., str], house: House, step: Callable[[], bool]
) -> None:
    serving = serve(adapters=["artifact:" + adapter("one")])
    serving.ready("one")
    old = serving.token
    with house.database.read() as session:
        running = Path(f"{engine_of(session, serving.id).socket}.running")
    running.write_text("1")
    assert serving.api.patch(f"/deployments/{serving.id}", json={"max_model_len": 64}).status_code == 200
    wait_for(lambda: step() and serving.shown()["generation"] == 2)
    assert serving.asks("plain") == serving.asks("one") == 200, "the adapter came along"
    wait_for(lambda: replicas(serving) == [(1, "ready", True), (2, "ready", False)])
    assert processes_with_token(old), "it still answers somebody"
    running.unlink()
    wait_for(lambda: step() and replicas(serving) == [(2, "ready", False)])
    wait_for(lambda: not processes_with_token(old))
    assert serving.asks("plain") == serving.asks("one") == 200
    assert serving.shown()["restarts"] == 0


def test_one_that_does_not_start_changes_nothing(
    serve: Callable[..., Serving], broken: str, step: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.replicas.CRASH_LOOP", 2)
    serving = serve()
    serving.ready()
    token = serving.token
    assert serving.api.patch(f"/deployments/{serving.id}", json={"model": f"artifact:{broken}"}).status_code == 200
    wait_for(lambda: step() and serving.shown()["coming"] is None)
    shown = serving.shown()
    assert (shown["generation"], shown["status"], shown["last_error"]["code"]) == (1, "ready", "engine_crash_loop")
    assert shown["last_error"]["message"].startswith("the replacement failed")
    assert processes_with_token(token)
    assert serving.asks("plain") == 200


def test_two_engines_and_one_of_them_is_killed(serve: Callable[..., Serving], house: House) -> None:
    serving = serve(replicas=2)
    wait_for(lambda: [status for _, status, _ in replicas(serving)] == ["ready", "ready"])
    route = serving.router.route_for("plain", PROJECT)
    assert len({target.socket for target in route.targets}) == 2
    victims = [
        pid
        for pid in processes_with_token(serving.tokens[0])
        if "fake_engine" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    os.kill(victims[0], signal.SIGKILL)
    wait_for(lambda: serving.shown()["restarts"] == 1)
    assert serving.shown()["status"] == "ready"
    wait_for(lambda: [status for _, status, _ in replicas(serving)] == ["ready", "ready"])
    with house.database.read() as session:
        rows = session.query(DeploymentReplica).all()
    assert sorted(row.restarts for row in rows) == [0, 1]


def test_fewer(serve: Callable[..., Serving], step: Callable[[], bool]) -> None:
    serving = serve(replicas=2)
    wait_for(lambda: [status for _, status, _ in replicas(serving)] == ["ready", "ready"])
    assert serving.api.patch(f"/deployments/{serving.id}", json={"replicas": 1}).status_code == 200
    wait_for(lambda: step() and replicas(serving) == [(1, "ready", False)])
    wait_for(lambda: sum(bool(processes_with_token(token)) for token in serving.tokens) == 1)
    assert serving.asks("plain") == 200
