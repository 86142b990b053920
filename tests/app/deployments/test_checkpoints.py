"""Checkpoints of runs as model names: found, loaded into a deployment of their base, refused with a reason."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db import Database
from app.deployments.routes import Router
from app.errors import Conflict, NotFound, Unavailable
from app.models import Checkpoint, new_id
from app.settings import Settings
from app.storage import Storage
from tests.support import make_lora_folder, make_model_folder, on_sqlite, train_spec

PROJECT = "proj-default"


@pytest.fixture
def run(api: TestClient, database: Database, storage: Storage, base: str, file_id: str) -> Callable[..., str]:
    """``run(name, *steps, config=…, whole=…)``: a train job on the base with checkpoints at these steps."""

    def run(name: str, *steps: int, config: dict[str, Any] | None = None, whole: bool = False) -> str:
        answer = api.post("/jobs", json=train_spec(base, file_id, experiment_name=name))
        assert answer.status_code == 201, answer.text
        job_id = str(answer.json()["id"])
        for step in steps:
            folder = storage.attempt_dir(job_id, 1) / f"checkpoint-{step}"
            folder = make_model_folder(folder) if whole else make_lora_folder(folder, config=config)
            size = storage.commit_checkpoint(folder, step)
            with database.write() as session:
                path = str(folder.relative_to(storage.root))
                row = Checkpoint(id=new_id("ftckpt"), job_id=job_id, fence=1, step=step, path=path, bytes=size)
                session.add(row)
        return job_id

    return run


@pytest.fixture
def router(database: Database, settings: Settings) -> Router:
    return Router(database, settings=settings)


def waking(router: Router, model: str, project: str = PROJECT) -> bool:
    with pytest.raises(Unavailable) as caught:
        router.route_for(model, project)
    return caught.value.code == "model_waking"


def test_it_is_loaded_when_it_is_first_asked_for(
    api: TestClient, run: Callable[..., str], router: Router, deployment: str, ready: Any
) -> None:
    job_id = run("line", 5, 10)
    ready(deployment)
    assert waking(router, "line:ckpt-step-10")
    assert waking(router, "line:ckpt-step-10")
    assert waking(router, f"{job_id}:ckpt-step-5")
    rows = {entry["name"]: entry for entry in api.get(f"/deployments/{deployment}/adapters").json()["data"]}
    assert set(rows) == {"line:ckpt-step-10", f"{job_id}:ckpt-step-5"}
    assert rows["line:ckpt-step-10"]["adapter"].endswith("checkpoint-10")
    ready_names = list(rows)
    ready(deployment, *ready_names)
    route = router.route_for("line:ckpt-step-10", PROJECT)
    assert (route.targets[0].socket, route.served_name) == ("/run/s", "line:ckpt-step-10")
    assert "line:ckpt-step-10" in [entry["id"] for entry in api.get("/v1/models").json()["data"]]
    for name in ready_names:
        assert api.delete(f"/deployments/{deployment}/adapters/{name}").status_code == 200


def test_one_that_can_be_asked_is_a_model_before_it_is_loaded(
    api: TestClient, run: Callable[..., str], deployment: str, ready: Any
) -> None:
    """Some clients look a model up before they chat."""
    job_id = run("line", 5)
    ready(deployment)
    shown = api.get("/v1/models/line:ckpt-step-5")
    assert shown.status_code == 200
    base = api.get(f"/deployments/{deployment}").json()["name"]
    expected = {"id": "line:ckpt-step-5", "object": "model", "root": job_id, "parent": base, "status": "evicted"}
    assert expected.items() <= shown.json().items()
    assert api.get(f"/deployments/{deployment}/adapters").json()["data"] == [], "looking loads nothing"
    assert api.get("/v1/models/line:ckpt-step-6").status_code == 404
    api.delete(f"/deployments/{deployment}")
    gone = api.get("/v1/models/line:ckpt-step-5")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    assert "POST /deployments" in gone.json()["error"]["hint"]


@on_sqlite
def test_the_newest_run_of_a_name_is_meant(
    api: TestClient, run: Callable[..., str], router: Router, deployment: str, ready: Any
) -> None:
    run("line", 5)
    second = run("line", 5)
    ready(deployment)
    assert waking(router, "line:ckpt-step-5")
    (row,) = api.get(f"/deployments/{deployment}/adapters").json()["data"]
    assert second in row["adapter"]


@pytest.mark.parametrize(
    "name", ["line:ckpt-step-7", "other:ckpt-step-5", "line:ckpt-5", ":ckpt-step-5", "../x:ckpt-step-5"]
)
@on_sqlite
def test_what_is_no_checkpoint_is_no_model(run: Callable[..., str], router: Router, deployment: str, name: str) -> None:
    run("line", 5)
    with pytest.raises(NotFound):
        router.route_for(name, PROJECT)


@on_sqlite
def test_without_a_deployment_of_its_base_it_says_what_to_do(run: Callable[..., str], router: Router) -> None:
    run("line", 5)
    with pytest.raises(NotFound, match="no deployment of artifact:") as caught:
        router.route_for("line:ckpt-step-5", PROJECT)
    assert "POST /deployments" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("made", "says", "helps"),
    [
        ({"config": {"use_dora": True}}, "it uses DoRA", "Merge it"),
        ({"whole": True}, "it holds whole weights", "ask line:ckpt-live while the run trains"),
    ],
)
@on_sqlite
def test_one_that_no_engine_can_load(
    api: TestClient,
    run: Callable[..., str],
    router: Router,
    settings: Settings,
    deployment: str,
    ready: Any,
    made: dict[str, Any],
    says: str,
    helps: str,
) -> None:
    """Whoever asks for it is told what to do, and no folder of the service's."""
    job_id = run("line", 5, **made)
    ready(deployment)
    with pytest.raises(Conflict, match=says) as caught:
        router.route_for("line:ckpt-step-5", PROJECT)
    shown = api.get("/v1/models/line:ckpt-step-5")
    error = shown.json()["error"]
    assert (shown.status_code, error["code"], error["param"]) == (409, "adapter_not_servable", "model")
    assert (error["message"], error["hint"]) == (caught.value.message, caught.value.hint)
    assert helps in error["hint"]
    assert f"GET /jobs/{job_id}/checkpoints" in error["hint"]
    assert str(settings.data_dir) not in shown.text


@on_sqlite
def test_one_whose_files_are_gone(
    api: TestClient, run: Callable[..., str], storage: Storage, settings: Settings, deployment: str, ready: Any
) -> None:
    job_id = run("line", 5)
    ready(deployment)
    shutil.rmtree(storage.attempt_dir(job_id, 1))
    shown = api.get("/v1/models/line:ckpt-step-5")
    assert (shown.status_code, shown.json()["error"]["code"]) == (404, "model_not_found")
    assert str(settings.data_dir) not in shown.text


@on_sqlite
def test_another_projects_checkpoints_do_not_exist(
    run: Callable[..., str], router: Router, deployment: str, ready: Any, make_key: Callable[..., str]
) -> None:
    run("line", 5)
    ready(deployment)
    make_key("proj-other")
    with pytest.raises(NotFound):
        router.route_for("line:ckpt-step-5", "proj-other")
