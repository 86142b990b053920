"""A deployment whose replica's job is final serves nothing, and does not go on saying otherwise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from app.db import Database
from app.discovery import discover
from app.jobs import repository
from app.jobs.repository import Move
from app.models import Job
from app.queue import SilentDoorbell
from app.reconciler import Reconciler
from app.settings import Settings
from app.states import JobState


@pytest.fixture
def deployed(api: TestClient, models: Path) -> dict[str, Any]:
    """A deployment that waits for a slot."""
    answer = api.post("/deployments", json={"name": "m", "model": str(models / "tiny")})
    assert answer.status_code == 201, answer.text
    body: dict[str, Any] = answer.json()
    return body


@pytest.fixture
def tick(settings: Settings, database: Database) -> Callable[[], None]:
    def tick() -> None:
        Reconciler(settings, database, discover(settings.packages), SilentDoorbell()).tick()

    return tick


def end_replica(database: Database, deployment: dict[str, Any], to: JobState) -> None:
    """Behind the deployment's back."""
    values = {"error_code": "crashed", "error_detail": {"message": "it crashed", "hint": None}}
    with database.write() as session:
        replica = deployment["replicas"][0]["id"]
        if to is JobState.FAILED:
            session.execute(update(Job).where(Job.id == replica).values(values))
        assert repository.transition(session, replica, JobState.QUEUED, Move(to, "end", "Over."))


@pytest.mark.parametrize(("to", "status"), [(JobState.CANCELLED, "stopped"), (JobState.FAILED, "failed")])
def test_the_reconciler_takes_it_off_the_list(
    api: TestClient, database: Database, deployed: dict[str, Any], tick: Callable[[], None], to: JobState, status: str
) -> None:
    end_replica(database, deployed, to)
    tick()
    shown = api.get(f"/deployments/{deployed['id']}").json()
    assert shown["status"] == status
    assert (shown["last_error"] or {}).get("message") == ("it crashed" if status == "failed" else None)
    assert api.get("/v1/models").json()["data"] == []


def test_a_delete_works_at_once_and_the_name_is_free_again(
    api: TestClient, database: Database, deployed: dict[str, Any], models: Path
) -> None:
    end_replica(database, deployed, JobState.CANCELLED)
    assert api.delete(f"/deployments/{deployed['id']}").status_code == 200
    assert api.get(f"/deployments/{deployed['id']}").json()["status"] == "stopped"
    assert api.post("/deployments", json={"name": "m", "model": str(models / "tiny")}).status_code == 201


def test_a_replica_is_stopped_by_its_deployment_alone(api: TestClient, deployed: dict[str, Any]) -> None:
    answer = api.post(f"/jobs/{deployed['replicas'][0]['id']}/cancel")
    assert answer.status_code == 409
    assert f"DELETE /deployments/{deployed['id']}" in answer.json()["error"]["hint"]
    assert api.get(f"/deployments/{deployed['id']}").json()["status"] == "queued"
