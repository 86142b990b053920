"""Adapters on a supervised engine: loaded, put away, brought back, refused, and there again after its death."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.errors import Conflict, NotFound, Unavailable
from app.processes import processes_with_token
from app.storage import Storage
from tests.deployed import engine_of
from tests.support import wait_for
from tests.workers.serving.conftest import PROJECT, Serving
from workers.keeper import differ
from workers.replica import UnixConnection
from workers.supervisor import House


def test_an_adapter_is_loaded_while_the_engine_serves_and_taken_off_again(
    serve: Callable[..., Serving], adapter: Callable[..., str], api: TestClient
) -> None:
    serving = serve()
    serving.ready()
    answer = serving.add("artifact:" + adapter("support"))
    assert (answer.status_code, answer.json()["name"], answer.json()["status"]) == (201, "support", "waiting")
    serving.ready("support")
    assert serving.asks("support") == serving.asks("plain") == 200
    wait_for(lambda: serving.shown()["adapters"][0]["effect"] is True)
    models = {entry["id"]: entry for entry in api.get("/v1/models").json()["data"]}
    assert (models["support"]["parent"], models["support"]["status"]) == ("plain", "ready")

    route = serving.router.route_for("support", PROJECT)
    gone = api.delete(f"/deployments/{serving.id}/adapters/support")
    assert gone.json() == {"id": "support", "object": "deployment.adapter", "deleted": True}
    with pytest.raises(NotFound):
        serving.router.route_for("support", PROJECT)
    serving.ring()
    wait_for(lambda: "adapter_unloaded" in serving.codes())
    connection = UnixConnection(route.targets[0].socket, 5)
    connection.request("POST", "/v1/completions", json.dumps({"model": "support", "prompt": "x"}))
    assert connection.getresponse().status == 404
    connection.close()


def test_one_without_effect_is_told_of(serve: Callable[..., Serving], adapter: Callable[..., str]) -> None:
    serving = serve(adapters=["artifact:" + adapter("nothing", "idle")])
    serving.ready("nothing")
    wait_for(lambda: "adapter_without_effect" in serving.codes())
    assert serving.shown()["adapters"][0]["effect"] is False


def test_one_that_the_engine_refuses_harms_nobody_else(
    serve: Callable[..., Serving], adapter: Callable[..., str]
) -> None:
    serving = serve(adapters=["artifact:" + adapter("bad", "refuse"), "artifact:" + adapter("good")])
    serving.ready("good")
    wait_for(lambda: serving.statuses()["bad"] == "failed")
    with pytest.raises(Conflict, match="expected target modules"):
        serving.router.route_for("bad", PROJECT)
    assert serving.asks("good") == 200


def test_one_that_was_altered_is_not_loaded(
    serve: Callable[..., Serving], adapter: Callable[..., str], storage: Storage
) -> None:
    artifact = adapter("changed")
    serving = serve()
    serving.ready()
    (storage.artifact_dir(artifact) / "adapter_model.safetensors").write_bytes(b"something else")
    assert serving.add(f"artifact:{artifact}").status_code == 400  # no whole safetensors file
    artifact = adapter("later")
    assert serving.add(f"artifact:{artifact}").status_code == 201
    serving.ready("later")
    config = storage.artifact_dir(artifact) / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 4'))
    assert serving.add(f"artifact:{artifact}", name="again").status_code == 201
    wait_for(lambda: serving.ring() or serving.statuses()["again"] == "failed")
    shown = next(entry for entry in serving.shown()["adapters"] if entry["name"] == "again")
    assert "not as published: adapter_config.json" in shown["error"]["message"]


def test_the_least_recently_used_is_put_away_and_comes_back_when_it_is_asked_for(
    serve: Callable[..., Serving], adapter: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.deployments.routes.USED_SECONDS", 0.0)
    names = ["one", "two", "three"]
    serving = serve(max_adapters=2, adapters=["artifact:" + adapter(name) for name in names])
    serving.ready("two", "three")
    wait_for(lambda: serving.statuses() == {"one": "evicted", "two": "ready", "three": "ready"})
    assert serving.asks("two") == 200  # now three is the one that nobody asked for
    with pytest.raises(Unavailable) as caught:
        serving.router.route_for("one", PROJECT)
    assert (caught.value.code, caught.value.retry_after) == ("model_waking", 5)
    serving.ready("one", "two")
    assert serving.statuses()["three"] == "evicted"
    assert serving.asks("one") == serving.asks("two") == 200


def test_after_the_engines_death_all_are_there_again(
    serve: Callable[..., Serving], adapter: Callable[..., str], house: House
) -> None:
    serving = serve(adapters=["artifact:" + adapter("one"), "artifact:" + adapter("two")])
    serving.ready("one", "two")
    with house.database.read() as session:
        socket = str(engine_of(session, serving.id).socket)
    victims = [
        pid for pid in processes_with_token(serving.token) if "fake_engine" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    os.kill(victims[0], signal.SIGKILL)
    wait_for(lambda: serving.shown()["restarts"] == 1)
    serving.ready("one", "two")
    assert serving.router.route_for("one", PROJECT).targets[0].socket != socket
    assert serving.asks("one") == serving.asks("two") == 200


# Sleep


@pytest.fixture
def quick_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.keeper.USED_SECONDS", 0.0)
    monkeypatch.setattr("app.deployments.routes.USED_SECONDS", 0.0)
    monkeypatch.setattr("workers.keeper.POLL_SECONDS", 0.1)
    monkeypatch.setattr("workers.keeper.ROUTES_LAST", 0.2)


def asleep(serving: Serving) -> bool:
    shown = serving.shown()
    (replica,) = serving.api.get("/jobs?type=serve").json()["data"]
    return (shown["status"], shown["desired"], replica["status"]) == ("sleeping", "running", "paused")


def test_an_engine_that_nobody_uses_ends_and_the_next_request_brings_it_back(
    serve: Callable[..., Serving], adapter: Callable[..., str], quick_sleep: None, api: TestClient
) -> None:
    serving = serve(idle_timeout=1, adapters=["artifact:" + adapter("one")])
    serving.ready("one")
    wait_for(lambda: asleep(serving))
    assert processes_with_token(serving.token) == []
    assert {entry["id"]: entry["status"] for entry in api.get("/v1/models").json()["data"]} == {
        "plain": "sleeping",
        "one": "sleeping",
    }
    with pytest.raises(Unavailable) as caught:
        serving.router.route_for("one", PROJECT)
    assert caught.value.code == "model_waking"
    assert (caught.value.retry_after or 0) <= 110
    with pytest.raises(Unavailable) as caught:
        serving.router.route_for("plain", PROJECT)
    assert caught.value.code == "model_waking", "on its way back it is worth waiting for"
    serving.ready("one")
    assert serving.asks("one") == serving.asks("plain") == 200
    assert serving.shown()["restarts"] == 0
    wait_for(lambda: asleep(serving))


def test_an_engine_that_is_busy_stays(serve: Callable[..., Serving], quick_sleep: None, house: House) -> None:
    serving = serve(idle_timeout=4)  # long enough to be told that it is busy
    serving.ready()
    with house.database.read() as session:
        running = Path(str(engine_of(session, serving.id).socket) + ".running")
    running.write_text("1")
    keeper = wait_for(keeper_thread)  # it begins a moment after the row says that the engine answers
    began = keeper._quiet_since  # type: ignore[attr-defined]
    wait_for(lambda: keeper._quiet_since > began)  # type: ignore[attr-defined]
    assert serving.shown()["status"] == "ready"
    running.unlink()
    wait_for(lambda: asleep(serving))


def keeper_thread() -> threading.Thread | None:
    return next((thread for thread in threading.enumerate() if thread.name.startswith("keeper-")), None)


def test_a_request_that_comes_while_it_ends_finds_it_again(
    serve: Callable[..., Serving], quick_sleep: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.keeper.ROUTES_LAST", 1.0)
    serving = serve(idle_timeout=1)
    serving.ready()
    first = serving.token
    wait_for(lambda: serving.shown()["status"] == "sleeping")
    assert processes_with_token(first), "it has not ended yet"
    with pytest.raises(Unavailable):
        serving.router.route_for("plain", PROJECT)
    wait_for(lambda: serving.token != first)
    serving.ready()
    assert serving.asks("plain") == 200


def test_one_that_sleeps_can_be_stopped(serve: Callable[..., Serving], quick_sleep: None, api: TestClient) -> None:
    serving = serve(idle_timeout=1)
    serving.ready()
    wait_for(lambda: asleep(serving))
    assert api.delete(f"/deployments/{serving.id}").status_code == 200
    assert serving.shown()["status"] == "stopped"
    with pytest.raises(NotFound):
        serving.router.route_for("plain", PROJECT)


def test_what_counts_as_a_different_answer() -> None:
    plain = [("a", -0.5), (" b", -1.25)]
    assert not differ(plain, plain)
    assert not differ(plain, [("a", -0.50001), (" b", -1.25)])
    assert differ(plain, [("a", -0.49), (" b", -1.25)])
    assert differ(plain, [("a", -0.5), (" c", -1.25)])
    assert differ(plain, plain[:1])
