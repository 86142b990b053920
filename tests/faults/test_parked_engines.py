"""A worker with an engine asleep on its GPU is killed or stopped: nothing is left, and a request starts another."""

import os
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db import Database
from app.deployments.routes import Router
from app.errors import Unavailable
from app.processes import processes_of_attempts
from app.settings import Settings
from tests.support import wait_for

pytestmark = pytest.mark.fault
PROJECT = "proj-default"
SMI = """#!/bin/sh
case "$*" in
*memory.used*) if ls {sockets}/*.asleep >/dev/null 2>&1; then used=1500; else used=70000; fi; echo "0, $used, 81920";;
*) echo "0, Pretend 80GB, 81920";;
esac
"""


@pytest.fixture
def backend() -> str:
    return "sqlite"


@pytest.fixture
def driver(settings: Settings, models: Path, tmp_path: Path) -> dict[str, str]:
    """A PATH with an nvidia-smi in it whose figures follow the engine, and one GPU slot."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(SMI.format(sockets=settings.sockets))
    program.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return {"PATH": path, "TUNESMITH_SLOTS": "gpu:1,light:1", "TUNESMITH_MODEL_ROOTS": str(models)}


@pytest.mark.parametrize("ending", ["kill", "stop"])
def test_a_worker_with_an_engine_asleep(
    worker: Any,
    api: TestClient,
    database: Database,
    models: Path,
    settings: Settings,
    driver: dict[str, str],
    ending: str,
) -> None:
    body = {"name": "plain", "engine": "pretend", "model": str(models / "tiny"), "idle_timeout": 1}
    deployment = api.post("/deployments", json=body).json()["id"]
    worker.start(**driver)

    def status() -> str:
        return str(api.get(f"/deployments/{deployment}").json()["status"])

    def asleep() -> bool:
        job = api.get("/jobs?type=serve").json()["data"][0]
        return (status(), job["status"]) == ("sleeping", "paused")

    wait_for(asleep, 60)
    assert _engines(settings), "it lives in its sleep"
    if ending == "kill":
        worker.kill()
    else:
        assert worker.stop() == 0
    wait_for(lambda: not processes_of_attempts(settings.instance), 2)
    assert asleep()
    worker.start(**driver)
    with pytest.raises(Unavailable):
        Router(database).route_for("plain", PROJECT)
    wait_for(lambda: status() == "ready", 60)
    assert worker.stop() == 0


def _engines(settings: Settings) -> list[int]:
    found = processes_of_attempts(settings.instance)
    return [pid for pid in found if "fake_engine" in Path(f"/proc/{pid}/cmdline").read_text()]
