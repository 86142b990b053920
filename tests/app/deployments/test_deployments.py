"""Deployments: by their own route and by deploy jobs, from queued to stopped, and what a lost replica does to them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from app.db import Database
from app.deployments import replicas
from app.deployments.routes import Route, Router, Target
from app.discovery import discover
from app.errors import NotFound, Unavailable
from app.jobs import claims
from app.models import Deployment, Job
from app.queue import SilentDoorbell
from app.reconciler import Reconciler, reap
from app.settings import Settings
from app.states import DEPLOYMENT_MOVES, DeploymentState
from tests.deployed import engine_of, said
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
            return said(session, deployment_id, to, **options)

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
    assert row["replicas"] == [
        {
            "id": replica["id"],
            "status": "queued",
            "generation": 1,
            "retiring": False,
            "restarts": 0,
            "started_at": None,
        }
    ]
    assert (row["generation"], row["coming"]) == (1, None)
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


@pytest.mark.parametrize("field", ["tool_call_parser", "reasoning_parser"])
@pytest.mark.parametrize("value", ["", "my_parser", "/tmp/plugin.py", "hermes --middleware=os", "HERMES", 3, None])
@on_sqlite
def test_only_vllms_own_parsers_can_be_named(api: TestClient, models: Path, field: str, value: Any) -> None:
    body = {"name": "a", "model": str(models / "tiny"), field: value}
    for answer in (api.post("/deployments", json=body), api.post("/jobs", json={"type": "deploy", **body})):
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, field), error
    plugin = {"name": "a", "model": str(models / "tiny"), "tool_parser_plugin": "/tmp/plugin.py"}
    assert api.post("/deployments", json=plugin).json()["error"]["code"] == "unknown_field"


@pytest.mark.parametrize("field", ["tool_call_parser", "reasoning_parser"])
@on_sqlite
def test_a_parser_that_the_engine_does_not_have(api: TestClient, models: Path, field: str) -> None:
    body = {"name": "a", "model": str(models / "tiny"), "engine": "transformers", field: "mistral"}
    for answer in (api.post("/deployments", json=body), api.post("/jobs", json={"type": "deploy", **body})):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "conflicting_fields", field)
        assert "engine: vllm" in error["hint"]
    for engine, value in (("transformers", "none"), ("transformers", "auto"), ("vllm", "mistral"), ("auto", "mistral")):
        answer = api.post("/deployments", json={**body, "name": f"{engine}-{value}", "engine": engine, field: value})
        assert (answer.status_code, answer.json()["options"][field]) == (201, value)


@on_sqlite
def test_fewer_bits_are_asked_for_by_vllms_names(api: TestClient, models: Path) -> None:
    body = {"name": "a", "model": str(models / "tiny"), "quantization": "fp8_per_block"}
    answer = api.post("/deployments", json={**body, "engine": "transformers"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "conflicting_fields")
    assert answer.json()["error"]["param"] == "quantization"
    for wrong in ("gguf", "", "fp8 --middleware=os", 8):
        answer = api.post("/deployments", json={**body, "quantization": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "quantization")
    answer = api.post("/deployments", json={**body, "engine": "vllm"})
    assert (answer.status_code, answer.json()["options"]["quantization"]) == (201, "fp8_per_block")


@on_sqlite
def test_gpus_may_be_asked_for_as_jobs_ask_for_them(api: TestClient, models: Path, database: Database) -> None:
    """In a deployment, in a change of one and in a job; it is the same as ``tensor_parallel_size``."""
    body = {"name": "a", "model": str(models / "tiny"), "resources": {"gpus": 2}}
    made = api.post("/deployments", json=body).json()
    assert made["options"]["tensor_parallel_size"] == 2
    with database.read() as session:
        assert session.get_one(Job, made["replicas"][0]["id"]).gpus == 2
    answer = api.patch(f"/deployments/{made['id']}", json={"resources": {"gpus": 4}})
    assert answer.json()["coming"]["options"]["tensor_parallel_size"] == 4
    job = api.post("/jobs", json={"type": "deploy", **body, "name": "b"}).json()
    assert job["resolved_spec"]["tensor_parallel_size"] == 2
    plain = api.post("/jobs", json={"type": "deploy", "name": "c", "model": body["model"], "tensor_parallel_size": 2})
    assert plain.json()["resolved_spec"]["tensor_parallel_size"] == 2
    for more in ({"tensor_parallel_size": 1}, {"resources": {"gpus": 0}}, {"resources": {"gpus": 9}}):
        for answer in (
            api.post("/deployments", json={**body, "name": "d", **more}),
            api.post("/jobs", json={"type": "deploy", **body, "name": "d", **more}),
        ):
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "resources.gpus"), answer.text


@on_sqlite
def test_memory_of_gpus_may_be_asked_for(api: TestClient, models: Path, database: Database) -> None:
    """Its engines' jobs wait for such a GPU as a training job does; null takes it back."""
    body = {"name": "a", "model": str(models / "tiny"), "resources": {"min_vram_gb": 80}}
    made = api.post("/deployments", json=body).json()
    assert (made["options"]["min_vram_gb"], made["options"]["tensor_parallel_size"]) == (80, 1)
    with database.read() as session:
        assert session.get_one(Job, made["replicas"][0]["id"]).min_vram_gb == 80
    for change, kept in (({"resources": {"min_vram_gb": 40}}, 40), ({"min_vram_gb": None}, None)):
        answer = api.patch(f"/deployments/{made['id']}", json=change)
        assert answer.json()["coming"]["options"]["min_vram_gb"] == kept
    job = api.post("/jobs", json={"type": "deploy", **body, "name": "b"}).json()
    assert job["resolved_spec"]["min_vram_gb"] == 80
    for more, param in (
        ({"min_vram_gb": 24}, "resources.min_vram_gb"),
        ({"resources": None, "min_vram_gb": 0}, "min_vram_gb"),
        ({"resources": {"min_vram_gb": -1}}, "resources.min_vram_gb"),
    ):
        answer = api.post("/deployments", json={**body, "name": "d", **more})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_a_name_is_served_once(api: TestClient, deploy: Any, models: Path, move: Any, claim: Any) -> None:
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
    second = deploy()
    assert second["id"] != first["id"]
    claim()
    move(second["id"], STARTING)
    api.delete(f"/deployments/{second['id']}")
    error = api.post("/deployments", json={"name": "support", "model": str(models / "tiny")}).json()["error"]
    assert (error["message"], error["hint"]) == (
        "a deployment named support is being stopped",
        "Try again in a moment.",
    )


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
    assert move(row["id"], STARTING)
    assert move(row["id"], READY, socket="/s")
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
    move(row["id"], STARTING)
    move(row["id"], READY, socket="/run/s")
    route = router.route_for("support", "proj-default")
    assert route == Route((Target(job.id, "/run/s"),), "support", row["id"])
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
                engine_of(session, row["id"]).status = origin
                session.get_one(Deployment, row["id"]).status = origin
            assert move(row["id"], to) == (to in DEPLOYMENT_MOVES[origin] or to == origin), (origin, to)


def test_the_word_of_one_that_is_unknown_counts_nothing(deploy: Any, database: Database) -> None:
    deploy()
    with database.write() as session:
        assert not replicas.move(session, "job-of-before", STARTING)


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_replica_whose_worker_fell_silent(
    api: TestClient, deploy: Any, claim: Any, move: Any, database: Database, cancelled: bool
) -> None:
    row = deploy()
    job = claim()
    move(row["id"], STARTING)
    move(row["id"], READY, socket="/s")
    if cancelled:
        api.delete(f"/deployments/{row['id']}")
    with database.write() as session:
        assert reap(session, session.get_one(Job, job.id))
    shown = api.get(f"/deployments/{row['id']}").json()
    assert shown["status"] == ("stopped" if cancelled else "queued")
    with database.read() as session:
        assert engine_of(session, row["id"]).socket is None


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
    claim()
    move(row["id"], STARTING)
    reconciler.tick()
    assert api.get(f"/jobs/{job_id}").json()["status"] == "running"
    move(row["id"], READY, socket="/s")
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
