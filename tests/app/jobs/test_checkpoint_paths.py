"""A checkpoint is named by its folder: where it lies, or where people see it. Its row says whose it is."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.artifacts import view
from app.db import Database
from app.discovery import discover
from app.models import Checkpoint, Job, new_id
from app.settings import Settings
from app.storage import Storage
from tests.support import make_adapter_folder, on_sqlite, train_spec
from workers.inputs import attempt_file


@pytest.fixture
def run(
    api: TestClient, models: Path, file_id: str, database: Database, storage: Storage
) -> Callable[..., dict[str, Any]]:
    """``run(**changes)``: a training job with a checkpoint after step 4, as a worker leaves it; shown in the view."""

    def run(**changes: Any) -> dict[str, Any]:
        job: dict[str, Any] = api.post("/jobs", json=train_spec(str(models / "tiny"), file_id, **changes)).json()
        folder = storage.attempt_dir(job["id"], 1) / "ckpt" / "checkpoint-4"
        make_adapter_folder(folder)
        (folder / "optimizer.pt").touch()
        path = str(folder.relative_to(storage.root))
        with database.write() as session:
            row = {"id": new_id("ftckpt"), "job_id": job["id"], "fence": 1, "step": 4, "path": path, "bytes": 1}
            session.add(Checkpoint(**row, metrics={}))
        view.refresh_job(database, storage, job["id"])
        return {**job, "folder": folder}

    return run


def shown(settings: Settings) -> Path:
    return settings.data_dir / "outputs" / "run" / "checkpoint-4"


def test_its_place_and_its_place_in_the_view_are_the_same(
    api: TestClient, run: Any, settings: Settings, database: Database, models: Path
) -> None:
    folder = run()["folder"]
    for path in (folder, shown(settings)):
        answer = api.post("/jobs", json={"type": "extract_adapter", "model": str(path)})
        assert answer.status_code == 201, answer.text
        assert answer.json()["resolved_spec"]["model"] == str(folder)
    with database.read() as session:
        job = session.get_one(Job, answer.json()["id"])
        inputs = attempt_file(session, settings, discover(settings.packages), job)["inputs"]
    assert inputs["model"]["path"] == str(folder)
    assert inputs["model"]["name"] == "run:ckpt-4"
    assert (inputs["model"]["kind"], inputs["model"]["base"]) == ("adapter", str(models / "tiny"))
    assert inputs["base_model"]["path"] == str(models / "tiny")


@on_sqlite
def test_it_can_be_merged_and_trained_on(
    api: TestClient, run: Any, settings: Settings, file_id: str, models: Path
) -> None:
    run()
    merge = api.post("/jobs", json={"type": "merge", "adapter": str(shown(settings))})
    assert merge.status_code == 201, merge.text
    assert api.post("/jobs", json=train_spec(str(shown(settings)), file_id)).status_code == 201
    judged = {"algorithm": "ppo", "reward_model": str(shown(settings))}
    refused = api.post("/jobs", json=train_spec(str(models / "tiny"), file_id, **judged))
    assert refused.json()["error"]["code"] == "wrong_kind"


@on_sqlite
def test_of_another_project_it_is_not_there(
    api: TestClient, run: Any, settings: Settings, make_key: Callable[..., str]
) -> None:
    folder = run()["folder"]
    other = {"authorization": f"Bearer {make_key('other')}"}
    for path in (folder, shown(settings)):
        answer = api.post("/jobs", json={"type": "check_adapter", "adapter": str(path)}, headers=other)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@on_sqlite
def test_what_has_no_row_is_not_there(api: TestClient, run: Any, settings: Settings, tmp_path: Path) -> None:
    folder = run()["folder"]
    stray = make_adapter_folder(settings.data_dir / "outputs" / "stray")
    foreign = make_adapter_folder(tmp_path / "elsewhere")
    led_out = settings.data_dir / "outputs" / "led_out"
    led_out.mkdir()
    os.symlink(foreign / "adapter_config.json", led_out / "adapter_config.json")
    for path in (stray, led_out, folder.parent, settings.data_dir, settings.data_dir / "tunesmith.db"):
        answer = api.post("/jobs", json={"type": "check_adapter", "adapter": str(path)})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), path


@on_sqlite
def test_one_that_was_rotated_away_is_not_there(api: TestClient, run: Any, settings: Settings) -> None:
    folder = run()["folder"]
    folder.rename(folder.with_name("gone"))
    answer = api.post("/jobs", json={"type": "check_adapter", "adapter": str(folder)})
    assert answer.status_code == 404
