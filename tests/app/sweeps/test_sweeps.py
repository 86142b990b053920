"""Sweeps: every combination a job, faults by their path, the best first, never more at once than asked."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from app.db import Database
from app.jobs import claims, repository
from app.jobs.repository import Move
from app.models import Job, Slot, Sweep, Worker
from app.states import JobState
from app.sweeps.points import points
from app.sweeps.schemas import SweepIn


@pytest.fixture
def body(models: Any, file_id: str) -> dict[str, Any]:
    model = {"model_name_or_path": str(models / "tiny")}
    return {
        "name": "rates",
        "spec": {"type": "train", "algorithm": "sft", "model": model, "dataset": {"file": file_id}},
        "matrix": {"training.learning_rate": [1e-4, 5e-4], "model.peft_config.r": [8, 16]},
    }


def test_every_combination_is_a_job(api: TestClient, body: dict[str, Any]) -> None:
    answer = api.post("/sweeps", json=body)
    assert answer.status_code == 201, answer.text
    sweep = answer.json()
    seen = [
        (p["job"]["experiment_name"], p["job"]["resolved_spec"]["training"]["learning_rate"]) for p in sweep["points"]
    ]
    assert seen == [("rates_1", 1e-4), ("rates_2", 1e-4), ("rates_3", 5e-4), ("rates_4", 5e-4)]
    assert [p["job"]["resolved_spec"]["model"]["peft_config"]["r"] for p in sweep["points"]] == [8, 16, 8, 16]
    assert (sweep["status"], sweep["best"], sweep["metric"]) == ("queued", None, "final_loss")
    assert api.get(f"/sweeps/{sweep['id']}").json() == sweep
    assert [row["id"] for row in api.get("/sweeps").json()["data"]] == [sweep["id"]]


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"matrix": {"training.learning_rte": [1]}}, "unknown_field", "matrix.training.learning_rte"),
        ({"matrix": {"training.learning_rate": [1e-4, -1]}}, "invalid_value", "matrix.training.learning_rate"),
        ({"matrix": {"training.learning_rate": []}}, "invalid_value", "matrix.training.learning_rate"),
        ({"matrix": {"training.learning_rate": {"min": 1e-5, "max": 1e-3}}}, "invalid_value", "matrix"),
        ({"matrix": {"priority": list(range(17)), "training.seed": list(range(17))}}, "invalid_value", "matrix"),
        ({"matrix": {"type.deep": [1]}}, "invalid_value", "matrix.type.deep"),
        ({"strategy": "random"}, "invalid_value", "samples"),
        ({"spec": {"type": "cook"}}, "invalid_value", "spec.type"),
        ({"matrix": {}}, "invalid_value", "matrix"),
        ({"metrik": "x"}, "unknown_field", "metrik"),
    ],
)
def test_a_fault_names_its_path_and_stores_nothing(
    api: TestClient, database: Database, body: dict[str, Any], change: dict[str, Any], code: str, param: str
) -> None:
    answer = api.post("/sweeps", json={**body, **change})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code), error
    assert error["param"].startswith(param), error
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 0
        assert session.scalar(select(func.count()).select_from(Sweep)) == 0


def test_samples_are_drawn_by_the_seed() -> None:
    asked = {
        "spec": {},
        "matrix": {"a": {"min": 1e-5, "max": 1e-2, "log": True}, "b": {"min": 1, "max": 9}, "c": ["x", "y"]},
        "strategy": "random",
        "samples": 20,
    }
    one, two = (points(SweepIn.model_validate({**asked, "seed": 7})) for _ in range(2))
    assert one == two != points(SweepIn.model_validate({**asked, "seed": 8}))
    assert len(one) == 20
    assert all(1e-5 <= point["a"] <= 1e-2 and point["b"] in range(1, 10) and point["c"] in "xy" for point in one)
    assert sum(point["a"] < 1e-3 for point in one) > 10, "even in the logarithm"


def test_a_small_matrix_gives_each_combination_once() -> None:
    asked = {"spec": {}, "matrix": {"a": [1, 2]}, "strategy": "random", "samples": 9}
    assert sorted(point["a"] for point in points(SweepIn.model_validate(asked))) == [1, 2]


@pytest.mark.parametrize(("goal", "order"), [("minimize", [1, 2, 0]), ("maximize", [2, 1, 0])])
def test_the_best_comes_first_and_what_has_no_value_last(
    api: TestClient, database: Database, body: dict[str, Any], goal: str, order: list[int]
) -> None:
    matrix = {"training.seed": [0, 1, 2]}
    sweep = api.post("/sweeps", json={**body, "matrix": matrix, "goal": goal}).json()
    ids = [point["job"]["id"] for point in sweep["points"]]
    for number, value in ((1, 0.5), (2, 0.7)):
        end(database, ids[number], {"final_loss": value})
    shown = api.get(f"/sweeps/{sweep['id']}").json()
    assert [ids.index(point["job"]["id"]) for point in shown["points"]] == order
    assert shown["best"] == ids[order[0]]
    assert [point["value"] for point in shown["points"]][-1] is None


def end(database: Database, job_id: str, result: dict[str, Any]) -> None:
    with database.write() as session:
        row = session.get_one(Job, job_id)
        row.state, row.worker_id = "running", "w"
        session.flush()
        move = Move(JobState.SUCCEEDED, "x", "x", values={"result": result})
        assert repository.transition(session, job_id, JobState.RUNNING, move)


def test_never_more_at_once_than_asked(api: TestClient, database: Database, body: dict[str, Any]) -> None:
    api.post("/sweeps", json={**body, "max_parallel": 2})
    with database.write() as session:
        session.add(Worker(id="w1", host="h", pid=1))
        session.flush()
        session.add_all(Slot(worker_id="w1", slot_id=f"light-{n}", slot_class="light") for n in range(6))

    def claim(number: int) -> str | None:
        with database.write() as session:
            job = claims.claim(session, "w1", f"light-{number}", ["light"])
            return job.id if job else None

    with ThreadPoolExecutor(6) as pool:
        taken = [job_id for job_id in pool.map(claim, range(6)) if job_id]
    assert len(taken) == 2


def test_one_delete_stops_all(api: TestClient, body: dict[str, Any]) -> None:
    sweep = api.post("/sweeps", json=body).json()
    answer = api.delete(f"/sweeps/{sweep['id']}")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    assert {point["job"]["status"] for point in answer.json()["points"]} == {"cancelled"}
    assert api.delete(f"/sweeps/{sweep['id']}").status_code == 200


def test_a_point_that_is_tried_again_stays_a_point(api: TestClient, body: dict[str, Any], database: Database) -> None:
    sweep = api.post("/sweeps", json=body).json()
    old = sweep["points"][0]["job"]["id"]
    api.post(f"/jobs/{old}/cancel")
    new = api.post(f"/jobs/{old}/retry").json()["id"]
    assert new in {point["job"]["id"] for point in api.get(f"/sweeps/{sweep['id']}").json()["points"]}


def test_the_same_key_is_the_same_sweep(api: TestClient, body: dict[str, Any]) -> None:
    headers = {"idempotency-key": "k"}
    first, second = (api.post("/sweeps", json=body, headers=headers).json()["id"] for _ in range(2))
    assert first == second
    assert api.post("/sweeps", json={**body, "seed": 1}, headers=headers).status_code == 422


def test_sweeps_of_others_are_not_there(api: TestClient) -> None:
    assert api.get(f"/sweeps/sweep-{'0' * 24}").status_code == 404
    assert api.delete(f"/sweeps/sweep-{'0' * 24}").status_code == 404
