"""Artifacts as jobs leave them, without running any."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.artifacts import repository as artifacts
from app.artifacts import view
from app.db import Database
from app.jobs import repository
from app.jobs.repository import Move
from app.models import Job, Slot, Worker, new_id
from app.states import JobState
from app.storage import Storage
from tests.support import make_adapter_folder, make_model_folder, train_spec

Left = Callable[..., str]


@pytest.fixture
def spec(models: Path, file_id: str) -> dict[str, Any]:
    """A LoRA run on a tiny base."""
    return train_spec(str(models / "tiny"), file_id)


@pytest.fixture
def left(api: TestClient, spec: dict[str, Any], database: Database, storage: Storage) -> Left:
    """``left(name, kind, spec)``: submits the spec and lets its job leave one artifact; that one's id."""
    with database.write() as session:
        session.add(Worker(id="w1", host="h", pid=1))
        session.flush()
        session.add(Slot(worker_id="w1", slot_id="s", slot_class="train"))

    def left(name: str = "support", kind: str = "adapter", body: dict[str, Any] | None = None) -> str:
        answer = api.post("/jobs", json=body or spec)
        assert answer.status_code == 201, answer.text
        return finish(answer.json()["id"], name, kind)

    def finish(job_id: str, name: str, kind: str) -> str:
        artifact_id = new_id("art")
        folder = storage.job_dir(job_id) / "out"
        (make_adapter_folder if kind in ("adapter", "reward") else make_model_folder)(folder)
        published = storage.publish(folder, artifact_id, {})
        with database.write() as session:
            started = Move(JobState.RUNNING, "job_started", "", values={"worker_id": "w1", "slot_id": "s"})
            assert repository.transition(session, job_id, JobState.QUEUED, started)
            job = session.get_one(Job, job_id)
            base = str(job.resolved_spec.get("model", {}).get("model_name_or_path", ""))
            artifacts.add(
                session,
                job,
                id=artifact_id,
                name=name,
                kind=kind,
                bytes=published.bytes,
                sha256=published.sha256,
                base_chain=[base, f"{job.algorithm}:{job_id}"],
                base_artifact_id=base.removeprefix("artifact:") if base.startswith("artifact:") else None,
                learning={"verdict": "learnt", "eval_loss": 0.25},
                facts={"base": base} if base else {},
            )
            result = {"artifact_ids": [artifact_id], "versions": {"torch": "2.13.0"}}
            done = Move(JobState.SUCCEEDED, "job_complete", "", values={"result": result})
            assert repository.transition(session, job_id, JobState.RUNNING, done)
        view.refresh_job(database, storage, job_id)
        return artifact_id

    left.finish = finish  # type: ignore[attr-defined]
    return left
