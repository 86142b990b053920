"""A real fine-tune and its merge, whose worker is killed in every phase, end with the bytes of those left alone."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.crashpoints import VARIABLE
from app.db import Database
from app.models import Job
from app.processes import processes_of_instance
from app.settings import Settings
from app.storage import Storage, sha256_of
from tests.faults.timeline import Timeline
from tests.support import on_sqlite, wait_for
from tests.workers.conftest import conversation, make_model

pytestmark = [pytest.mark.fault, pytest.mark.long, pytest.mark.timeout(900), on_sqlite]
STEPS = 200
SAVE = 20


class Runs:
    """The same fine-tune and the same merge, again and again."""

    def __init__(self, api: TestClient, database: Database, storage: Storage, base: Path) -> None:
        self._api = api
        self._database = database
        self._storage = storage
        self._base = base
        rows = "".join(json.dumps({"messages": conversation(number)}) + "\n" for number in range(200))
        self._file = api.post("/files", files={"file": ("rows.jsonl", rows.encode())}).json()["id"]

    def _submit(self, spec: dict[str, Any]) -> str:
        answer = self._api.post("/jobs", json=spec)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def train(self) -> str:
        return self._submit(
            {
                "type": "train",
                "algorithm": "sft",
                "model": {"model_name_or_path": str(self._base), "peft_config": {"r": 4}},
                "dataset": {"file": self._file},
                "training": {"max_steps": STEPS, "save_steps": SAVE, "learning_rate": 1e-3},
            }
        )

    def merge(self, train_id: str) -> str:
        (adapter,) = self._api.get(f"/jobs/{train_id}").json()["artifact_ids"]
        return self._submit({"type": "merge", "base_model": str(self._base), "adapter": f"artifact:{adapter}"})

    def row(self, job_id: str) -> Job:
        with self._database.read() as session:
            return session.get_one(Job, job_id)

    def phase(self, job_id: str) -> str | None:
        """The last one that the newest attempt told; None before and after it runs."""
        job = self.row(job_id)
        journal = self._storage.attempt_dir(job_id, job.fence) / "events.jsonl"
        if job.state != "running" or not journal.exists():
            return None
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        phases = [line["phase"] for line in lines if line["kind"] == "phase"]
        return phases[-1] if phases else None

    def weights(self, job_id: str) -> dict[str, str]:
        (artifact,) = self._api.get(f"/jobs/{job_id}").json()["artifact_ids"]
        assert self._storage.verify(artifact) == []
        return {path.name: sha256_of(path) for path in self._storage.artifact_dir(artifact).glob("*.safetensors")}

    def restarts(self, job_id: str) -> int:
        events = self._api.get(f"/jobs/{job_id}/events", params={"limit": 1000}).json()["data"]
        assert not [event for event in events if event["code"] == "checkpoint_rejected"]
        return sum(event["code"] == "job_restarted" for event in events)


@pytest.fixture
def runs(api: TestClient, database: Database, storage: Storage, models: Path) -> Runs:
    return Runs(api, database, storage, make_model(models / "trainable"))


def test_a_worker_that_is_killed_in_every_phase(
    worker: Any, runs: Runs, until: Callable[..., Job], settings: Settings, models: Path, timeline: Timeline
) -> None:
    """Case 3. Staging, loading, training, saving, committing; merging, committing."""
    environment = {"TUNESMITH_SLOTS": "train:1,light:1", "TUNESMITH_MODEL_ROOTS": str(models)}

    def killed_in(job_id: str, phase: str) -> None:
        worker.start(**environment)
        wait_for(lambda: runs.phase(job_id) == phase, 90)
        if phase == "training":
            wait_for(lambda: runs.row(job_id).ckpt_step >= 2 * SAVE, 90)
        begun = time.monotonic()
        worker.kill()
        assert runs.phase(job_id) == phase, "it was too quick for this test"
        wait_for(lambda: not processes_of_instance(settings.instance), 15)
        timeline.bound("P13", f"worker killed while {phase} → its runner is gone", time.monotonic() - begun, 15)

    def killed_while_it_commits(job_id: str) -> None:
        worker.start(**{VARIABLE: "publish.before_rename", **environment})
        assert worker.process.wait(120) == -9
        timeline.say("killed while committing")

    crooked = runs.train()
    for phase in ("staging", "loading", "training", "saving"):
        killed_in(crooked, phase)
    killed_while_it_commits(crooked)
    worker.start(**environment)
    job = until(crooked, "succeeded", seconds=90)
    assert runs.restarts(crooked) == 3
    straight = runs.train()
    until(straight, "succeeded", seconds=90)
    merged = runs.merge(straight)
    until(merged, "succeeded", seconds=90)
    worker.stop()

    merged_again = runs.merge(crooked)
    killed_in(merged_again, "merging")
    killed_while_it_commits(merged_again)
    worker.start(**environment)
    until(merged_again, "succeeded", seconds=90)
    equal = [runs.weights(crooked) == runs.weights(straight), runs.weights(merged_again) == runs.weights(merged)]
    timeline.say(f"{job.fence} fences; adapter and merged model equal: {equal}")
    timeline.count("P7", "results equal after a kill of the worker in seven phases", sum(equal), of=2)
