"""Engines that fail, under real supervision: what the deployment says, and that nothing of them is left."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.catalog import Catalog
from app.processes import processes_with_token
from tests.support import wait_for
from tests.workers.serving.conftest import Serving
from workers.supervisor import House


def ended(serving: Serving, status: str = "failed") -> None:
    wait_for(lambda: serving.shown()["status"] == status)
    wait_for(lambda: processes_with_token(serving.token) == [])


@pytest.mark.parametrize("mode", ["exits"])
def test_one_that_exits_at_once_is_a_crash_loop_with_the_end_of_its_log(serve: Callable[..., Serving]) -> None:
    serving = serve()
    ended(serving)
    error = serving.shown()["last_error"]
    assert error["code"] == "engine_crash_loop"
    assert "the weights are damaged" in error["hint"]
    assert serving.codes().count("engine_died") == 4


@pytest.mark.parametrize(("field", "value"), [("reasoning_parser", "qwen3"), ("quantization", "mxfp8")])
def test_what_the_engine_turns_out_not_to_have(
    serve: Callable[..., Serving], monkeypatch: pytest.MonkeyPatch, field: str, value: str
) -> None:
    """``engine: auto`` passes the check of the request; which engine it is, the worker knows."""
    monkeypatch.setattr(Catalog, "check_engine", lambda *_: None)
    serving = serve(**{field: value})
    ended(serving)
    error = serving.shown()["last_error"]
    assert (error["code"], field in error["message"]) == ("conflicting_fields", True)


def test_fewer_bits_are_made_on_a_gpu_alone(
    serve: Callable[..., Serving], house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = house.catalog.engines["pretend"]
    monkeypatch.setitem(house.catalog.engines, "pretend", replace(engine, quantizes=True))
    monkeypatch.setattr(Catalog, "check_engine", lambda *_: None)
    serving = serve(quantization="fp8_per_tensor")
    ended(serving)
    error = serving.shown()["last_error"]
    assert (error["code"], "there is none here" in error["message"]) == ("conflicting_fields", True)


@pytest.mark.parametrize("mode", ["lies", "never_ready"])
def test_one_that_never_completes_anything_is_not_ready(serve: Callable[..., Serving]) -> None:
    serving = serve(start_timeout=10)
    ended(serving)
    assert serving.shown()["last_error"]["code"] == "start_timeout"
    assert serving.shown()["ready_at"] is None


@pytest.mark.parametrize("mode", ["dies"])
def test_one_that_dies_in_use_is_there_again(serve: Callable[..., Serving]) -> None:
    serving = serve()
    serving.ready()
    for _ in range(8):
        assert serving.asks("plain") == 200
    with pytest.raises(OSError, match=".*"):
        serving.asks("plain")
    wait_for(lambda: serving.shown()["restarts"] == 1)
    assert serving.shown()["last_error"]["code"] == "engine_died"
    assert "a kernel fell over" in serving.shown()["last_error"]["log_tail"]
    serving.ready()
    assert serving.asks("plain") == 200


@pytest.mark.parametrize("mode", ["leaks"])
def test_a_child_that_it_leaked_goes_with_it(serve: Callable[..., Serving], api: TestClient) -> None:
    serving = serve()
    serving.ready()
    assert len(processes_with_token(serving.token)) >= 4, "replica, guard, engine and its stray child"
    assert api.delete(f"/deployments/{serving.id}").status_code == 200
    ended(serving, "stopped")


@pytest.mark.parametrize("mode", ["never_ready"])
def test_stopping_while_it_starts_and_stopping_twice(serve: Callable[..., Serving], api: TestClient) -> None:
    serving = serve()
    wait_for(lambda: serving.shown()["status"] == "starting")
    wait_for(lambda: hasattr(serving, "token") and processes_with_token(serving.token))
    for _ in range(2):
        assert api.delete(f"/deployments/{serving.id}").status_code == 200
    ended(serving, "stopped")
    assert api.delete(f"/deployments/{serving.id}").status_code == 200


def test_starting_twice_is_one_engine(serve: Callable[..., Serving], api: TestClient, base: str) -> None:
    serving = serve()
    answer = api.post("/deployments", json={"name": "plain", "engine": "pretend", "model": f"artifact:{base}"})
    assert answer.status_code == 409
    serving.ready()
    engines = [
        pid for pid in processes_with_token(serving.token) if "fake_engine" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    assert len(engines) == 1


def test_kill_9_of_the_process_that_keeps_the_engine(serve: Callable[..., Serving]) -> None:
    serving = serve()
    serving.ready()
    before = processes_with_token(serving.token)
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in before}
    os.kill(next(pid for pid, line in lines.items() if "workers.replica" in line), signal.SIGKILL)
    wait_for(lambda: serving.shown()["restarts"] == 1)
    assert not set(before) & set(processes_with_token(serving.token))
    serving.ready()
    assert serving.asks("plain") == 200
