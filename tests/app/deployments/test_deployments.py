"""Deployments: by their own route and by deploy jobs, from queued to stopped, and what a lost replica does to them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from app.db import Database
from app.deployments import repository
from app.deployments.service import Router
from app.discovery import discover
from app.errors import NotFound, Unavailable
from app.jobs import claims
from app.models import Deployment, Job, now
from app.queue import SilentDoorbell
from app.reconciler import Reconciler, reap
from app.settings import Settings
from app.states import DEPLOYMENT_MOVES, DeploymentState
from tests.support import make_adapter_folder, on_sqlite

QUEUED, STARTING, READY, UNHEALTHY, SLEEPING, STOPPED, FAILED = DeploymentState


@pytest.fixture
def deploy(api: TestClient, models: Path) -> Callable[..., dict[str, Any]]:
    def deploy(name: str = "support", **fields: Any) -> dict[str, Any]:
        answer = api.post("/deployments", json={"name": name, "model": str(models / "tiny"), **fields})
        assert answer.status_code == 201, answer.text
        row: dict[str, Any] = answer.json()
        return row

    return deploy


@pytest.fixture
def move(database: Database) -> Callable[..., bool]:
    def move(deployment_id: str, to: DeploymentState, **options: Any) -> bool:
        with database.write() as session:
            return repository.transition(session, deployment_id, to, **options)

    return move


@pytest.fixture
def reconciler(settings: Settings, database: Database) -> Reconciler:
    return Reconciler(settings, database, discover(settings.packages), SilentDoorbell())


@pytest.fixture
def claim(database: Database) -> Callable[[], Job | None]:
    def claim() -> Job | None:
        with database.write() as session:
            return claims.claim(session, "w", "serve-0", ["serve"])

    return claim


def test_a_deployment_and_its_replica(api: TestClient, deploy: Any, claim: Any, settings: Settings) -> None:
    row = deploy(max_model_len=256)
    assert (row["status"], row["desired"], row["restarts"]) == ("queued", "running", 0)
    assert row["endpoint"] == f"{settings.base_url}/v1"
    assert row["options"]["max_model_len"] == 256
    assert api.get(f"/deployments/{row['id']}").json() == row
    assert api.get("/deployments").json()["data"] == [row]
    assert [model["id"] for model in api.get("/v1/models").json()["data"]] == ["support"]
    assert api.get("/v1/models/support").json()["status"] == "queued"
    # A replica is a job, hidden unless it is asked for.
    assert api.get("/jobs").json()["data"] == []
    (replica,) = api.get("/jobs?type=serve").json()["data"]
    assert row["replicas"] == [{"id": replica["id"], "status": "queued", "started_at": None}]
    job = claim()
    assert job is not None
    assert job.id == replica["id"]


@on_sqlite
def test_what_cannot_be_served(api: TestClient, models: Path) -> None:
    make_adapter_folder(models / "adapter")
    answer = api.post("/deployments", json={"name": "a", "model": str(models / "adapter")})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_invalid")
    assert "adapters" in answer.json()["error"]["hint"]
    (models / "none").mkdir()
    answer = api.post("/deployments", json={"name": "a", "model": str(models / "none")})
    assert answer.status_code == 400


def test_a_name_is_served_once(api: TestClient, deploy: Any, models: Path, move: Any) -> None:
    first = deploy()
    for answer in (
        api.post("/deployments", json={"name": "support", "model": str(models / "tiny")}),
        api.post("/jobs", json={"type": "deploy", "name": "support", "model": str(models / "tiny")}),
    ):
        assert answer.status_code == 409
        assert answer.headers["x-should-retry"] == "false"
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("name_taken", "name")
        assert first["id"] in error["hint"]
    assert api.delete(f"/deployments/{first['id']}").status_code == 200
    assert deploy()["id"] != first["id"]


def test_two_live_rows_of_one_name_cannot_be(deploy: Any, database: Database) -> None:
    row = deploy()

    def twice() -> None:
        with database.write() as session:
            session.add(Deployment(id="dep-x", project_id="proj-default", name="support", model=row["model"]))

    with pytest.raises(IntegrityError):
        twice()


def test_stopping_one_that_waits(api: TestClient, deploy: Any, database: Database) -> None:
    row = deploy()
    answer = api.delete(f"/deployments/{row['id']}")
    assert answer.json() == {"id": row["id"], "object": "deployment", "deleted": True}
    stopped = api.get(f"/deployments/{row['id']}").json()
    assert (stopped["status"], stopped["desired"], stopped["replicas"]) == ("stopped", "stopped", [])
    with database.read() as session:
        assert session.scalars(select(Job.state)).all() == ["cancelled"]
    assert api.get("/v1/models").json()["data"] == []
    assert api.delete(f"/deployments/{row['id']}").status_code == 200


def test_stopping_one_that_runs_asks_its_worker(
    api: TestClient, deploy: Any, claim: Any, move: Any, database: Database
) -> None:
    row = deploy()
    job = claim()
    assert move(row["id"], STARTING, replica=job.id)
    assert move(row["id"], READY, replica=job.id, socket="/s", ready_at=now())
    assert api.delete(f"/deployments/{row['id']}").status_code == 200
    assert api.get(f"/deployments/{row['id']}").json()["desired"] == "stopped"
    with database.read() as session:
        replica = session.get_one(Job, job.id)
    assert (replica.state, replica.cancel_requested_at is not None) == ("running", True)
    assert api.delete(f"/deployments/{row['id']}").status_code == 200
    with database.read() as session:
        assert session.get_one(Job, job.id).next_seq == replica.next_seq


def test_the_gateway_finds_only_what_answers(
    deploy: Any, database: Database, settings: Settings, move: Any, claim: Any
) -> None:
    router = Router(database, settings)
    with pytest.raises(NotFound):
        router.route_for("support", "proj-default")
    row = deploy()
    job = claim()
    with pytest.raises(Unavailable) as caught:
        router.route_for("support", "proj-default")
    assert caught.value.retry_after
    move(row["id"], STARTING, replica=job.id)
    move(row["id"], READY, replica=job.id, socket="/run/s")
    route = router.route_for("support", "proj-default")
    assert (route.socket, route.served_name, route.deployment_id) == ("/run/s", "support", row["id"])
    with pytest.raises(NotFound):
        router.route_for("support", "proj-other")
    move(row["id"], FAILED)
    with pytest.raises(NotFound):
        router.route_for("support", "proj-default")


def test_the_moves_that_are_allowed(deploy: Any, database: Database, move: Any) -> None:
    row = deploy()
    for origin in DeploymentState:
        for to in DeploymentState:
            with database.write() as session:
                session.get_one(Deployment, row["id"]).status = origin
            assert move(row["id"], to) == (to in DEPLOYMENT_MOVES[origin] or to == origin), (origin, to)


def test_another_replicas_word_counts_nothing(deploy: Any, claim: Any, move: Any) -> None:
    row = deploy()
    claim()
    assert not move(row["id"], STARTING, replica="job-of-before")


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_replica_whose_worker_fell_silent(
    api: TestClient, deploy: Any, claim: Any, move: Any, database: Database, cancelled: bool
) -> None:
    row = deploy()
    job = claim()
    move(row["id"], STARTING, replica=job.id)
    move(row["id"], READY, replica=job.id, socket="/s")
    if cancelled:
        api.delete(f"/deployments/{row['id']}")
    with database.write() as session:
        assert reap(session, session.get_one(Job, job.id))
    shown = api.get(f"/deployments/{row['id']}").json()
    assert shown["status"] == ("stopped" if cancelled else "queued")
    with database.read() as session:
        assert session.get_one(Deployment, row["id"]).socket is None


# Deploy jobs


@pytest.fixture
def submit(api: TestClient, models: Path) -> Callable[..., str]:
    def submit(name: str = "support", **fields: Any) -> str:
        body = {"type": "deploy", "name": name, "model": str(models / "tiny"), **fields}
        answer = api.post("/jobs", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    return submit


def test_a_deploy_job_ends_with_the_first_ready(
    api: TestClient, submit: Any, reconciler: Reconciler, claim: Any, move: Any, settings: Settings
) -> None:
    job_id = submit(max_model_len=512)
    reconciler.tick()
    assert api.get(f"/jobs/{job_id}").json()["status"] == "running"
    (row,) = api.get("/deployments").json()["data"]
    assert (row["name"], row["options"]["max_model_len"]) == ("support", 512)
    replica = claim()
    move(row["id"], STARTING, replica=replica.id)
    reconciler.tick()
    assert api.get(f"/jobs/{job_id}").json()["status"] == "running"
    move(row["id"], READY, replica=replica.id, socket="/s")
    reconciler.tick()
    job = api.get(f"/jobs/{job_id}").json()
    assert job["status"] == "succeeded"
    assert job["result"] == {"deployment_id": row["id"], "name": "support", "endpoint": f"{settings.base_url}/v1"}
    assert len(api.get("/deployments").json()["data"]) == 1


def test_a_deploy_job_fails_with_its_deployment(
    api: TestClient, submit: Any, reconciler: Reconciler, claim: Any, move: Any
) -> None:
    job_id = submit()
    reconciler.tick()
    (row,) = api.get("/deployments").json()["data"]
    detail = {"code": "start_timeout", "message": "not ready within 600 s", "hint": "Its log ends: …"}
    move(row["id"], FAILED, last_error=detail)
    reconciler.tick()
    job = api.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["error"]) == ("failed", {**detail, "param": None})


def test_cancelling_a_deploy_job_stops_its_deployment(api: TestClient, submit: Any, reconciler: Reconciler) -> None:
    job_id = submit()
    reconciler.tick()
    assert api.post(f"/jobs/{job_id}/cancel").status_code == 202
    reconciler.tick()
    assert api.get(f"/jobs/{job_id}").json()["status"] == "cancelled"
    assert [row["status"] for row in api.get("/deployments").json()["data"]] == ["stopped"]


def test_a_deploy_job_whose_name_was_taken_meanwhile(
    api: TestClient, submit: Any, deploy: Any, reconciler: Reconciler
) -> None:
    job_id = submit()
    other = submit("other")
    deploy()
    reconciler.tick()
    job = api.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["error"]["code"]) == ("failed", "name_taken")
    assert api.get(f"/jobs/{other}").json()["status"] == "running"


def test_several_reconcilers_make_one_deployment(
    api: TestClient, submit: Any, settings: Settings, database: Database
) -> None:
    for number in range(3):
        submit(f"name{number}")
    catalog = discover(settings.packages)
    several = [Reconciler(settings, database, catalog, SilentDoorbell()) for _ in range(4)]
    for each in several:
        each.start()
    try:
        from tests.support import wait_for  # noqa: PLC0415

        wait_for(lambda: len(api.get("/deployments").json()["data"]) == 3)
    finally:
        for each in several:
            each.stop()
    assert {row["name"] for row in api.get("/deployments").json()["data"]} == {"name0", "name1", "name2"}
    assert {job["status"] for job in api.get("/jobs").json()["data"]} == {"running"}
