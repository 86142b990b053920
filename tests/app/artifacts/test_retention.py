"""Checkpoints go when the operator's retention is over, but for the best and for what is needed."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.artifacts import retention, view
from app.db import Database
from app.discovery import discover
from app.models import DEFAULT_PROJECT, Checkpoint, Deployment, DeploymentAdapter, DeploymentReplica, Job, now
from app.queue import SilentDoorbell
from app.reconciler import Reconciler
from app.settings import Settings
from app.storage import Storage
from tests.app.artifacts.conftest import Left
from tests.support import on_sqlite


def checkpoints(database: Database, storage: Storage, job_id: str, best: int | None = 2) -> dict[int, Path]:
    """Three checkpoints with their folders, of which one is the best."""
    found = {}
    with database.write() as session:
        for step in (1, 2, 3):
            folder = storage.attempt_dir(job_id, 1) / "ckpt" / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            (folder / "adapter_config.json").write_text("{}")
            path = str(folder.relative_to(storage.root))
            session.add(
                Checkpoint(
                    id=f"ftckpt-{step}", job_id=job_id, fence=1, step=step, path=path, bytes=2, best=step == best
                )
            )
            found[step] = folder
    view.refresh_job(database, storage, job_id)
    return found


def ended(api: TestClient, left: Left) -> str:
    return str(api.get(f"/artifacts/{left('support')}").json()["job_id"])


def steps(api: TestClient, job_id: str) -> set[int]:
    return {row["step"] for row in api.get(f"/jobs/{job_id}/checkpoints").json()["data"]}


def test_only_the_best_stays(
    api: TestClient, left: Left, database: Database, storage: Storage, settings: Settings
) -> None:
    job_id = ended(api, left)
    folders = checkpoints(database, storage, job_id)
    people = settings.data_dir / "outputs" / "run"
    assert (people / "checkpoint-3").is_dir()
    assert retention.expire(database, storage, 7, now() + timedelta(days=6.9)) == []
    gone = retention.expire(database, storage, 7, now() + timedelta(days=7.1))
    assert gone == ["ftckpt-1", "ftckpt-3"]
    assert steps(api, job_id) == {2}
    assert [step for step, folder in folders.items() if folder.exists()] == [2]
    assert sorted(path.name for path in people.glob("checkpoint-*")) == ["checkpoint-2"]
    assert retention.expire(database, storage, 7, now() + timedelta(days=8)) == []


def test_what_an_unfinished_job_names_stays(
    api: TestClient, left: Left, database: Database, storage: Storage, spec: dict[str, Any]
) -> None:
    job_id = ended(api, left)
    folders = checkpoints(database, storage, job_id, best=None)
    waiting = submitted(api, spec)
    with database.write() as session:
        by_id = {**session.get_one(Job, job_id).resolved_spec, "from_checkpoint": "ftckpt-1"}
        session.get_one(Job, waiting).resolved_spec = by_id
    answer = api.post("/jobs", json={"type": "check_adapter", "adapter": str(folders[3])})
    assert answer.status_code == 201, answer.text
    assert retention.expire(database, storage, 1, now() + timedelta(days=2)) == ["ftckpt-2"]


@on_sqlite
@pytest.mark.parametrize("by", ["adapter", "engine", "model", "coming"])
def test_what_a_live_deployment_has_stays(
    api: TestClient, left: Left, database: Database, storage: Storage, by: str
) -> None:
    """An engine that restarts, or that put it away, has to load it again."""
    job_id = ended(api, left)
    path = str(checkpoints(database, storage, job_id, best=None)[1])
    with database.write() as session:
        row = Deployment(id="dep-1", project_id=DEFAULT_PROJECT, name="chat", model="artifact:art-0", status="ready")
        session.add(row)
        session.flush()
        if by == "adapter":
            session.add(
                DeploymentAdapter(
                    deployment_id=row.id,
                    project_id=DEFAULT_PROJECT,
                    name="run:ckpt-step-1",
                    model=path,
                    status="evicted",
                )
            )
        elif by == "engine":
            loaded = {"run:ckpt-step-1": path}
            session.add(DeploymentReplica(id=job_id, deployment_id=row.id, status="ready", loaded=loaded))
        elif by == "model":
            row.model = path
        else:
            row.coming = {"model": path, "artifact_id": None, "options": {}}
    assert retention.expire(database, storage, 1, now() + timedelta(days=2)) == ["ftckpt-2", "ftckpt-3"]
    with database.write() as session:
        session.get_one(Deployment, "dep-1").status = "stopped"
        for replica in session.query(DeploymentReplica):
            replica.status = "stopped"
    assert retention.expire(database, storage, 1, now() + timedelta(days=2)) == ["ftckpt-1"]


def submitted(api: TestClient, spec: dict[str, Any]) -> str:
    return str(api.post("/jobs", json=spec).json()["id"])


@on_sqlite
def test_a_run_that_is_not_over_keeps_them_all(
    api: TestClient, left: Left, database: Database, storage: Storage, spec: dict[str, Any]
) -> None:
    checkpoints(database, storage, submitted(api, spec))
    assert retention.expire(database, storage, 1, now() + timedelta(days=900)) == []


@on_sqlite
@pytest.mark.parametrize(("days", "left_over"), [(None, {1, 2, 3}), (5, {2})])
def test_the_reconciler_does_it_when_it_is_asked_for(
    api: TestClient,
    left: Left,
    database: Database,
    storage: Storage,
    settings: Settings,
    days: float | None,
    left_over: set[int],
) -> None:
    job_id = ended(api, left)
    checkpoints(database, storage, job_id)
    asked = settings.model_copy(update={"checkpoint_days": days})
    clock = [0.0]
    reconciler = Reconciler(
        asked,
        database,
        discover(()),
        SilentDoorbell(),
        monotonic=lambda: clock[0],
        wall=lambda: now() + timedelta(seconds=clock[0]),
    )
    reconciler.tick()
    assert steps(api, job_id) == {1, 2, 3}
    clock[0] = 6 * 86400.0
    reconciler.tick()
    assert steps(api, job_id) == left_over
