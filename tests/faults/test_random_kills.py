"""A training run that is killed (P7) or stopped (P10) at random steps ends with the bytes of one that never was."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db import Database
from app.models import Job
from app.processes import processes_with_token
from app.settings import Settings
from app.storage import Storage, sha256_of
from tests.faults.timeline import Timeline
from tests.support import on_sqlite, wait_for
from tests.workers.conftest import conversation, make_model

pytestmark = [pytest.mark.fault, on_sqlite]
STEPS = 300
SLOW_STEPS = 120
SAVE = 20
TRAINING = {"max_steps": STEPS, "save_steps": SAVE, "learning_rate": 1e-3}


class Runs:
    """The same run, again and again."""

    def __init__(self, api: TestClient, database: Database, storage: Storage, settings: Settings, base: Path) -> None:
        self._api = api
        self._database = database
        self._storage = storage
        self._settings = settings
        self._base = base
        rows = "".join(json.dumps({"messages": conversation(number)}) + "\n" for number in range(200))
        file = api.post("/files", files={"file": ("rows.jsonl", rows.encode())}).json()["id"]
        self._spec = {
            "type": "train",
            "algorithm": "sft",
            "model": {"model_name_or_path": str(base), "peft_config": {"r": 4}},
            "dataset": {"file": file},
            "training": TRAINING,
            "retry": {"backoff_seconds": 0.0},
        }

    def submit(self, name: str, **more: Any) -> str:
        answer = self._api.post("/jobs", json={**self._spec, "experiment_name": name, **more})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def row(self, job_id: str) -> Job:
        with self._database.read() as session:
            return session.get_one(Job, job_id)

    def reach(self, job_id: str, step: int) -> Job:
        """Waits until the running attempt itself says that it is there."""

        def there() -> Job | None:
            job = self.row(job_id)
            assert job.state in ("queued", "running"), f"it was too quick for this test: {job.state}"
            return job if job.state == "running" and max(self._steps(job), default=0) >= step else None

        job = wait_for(there, 90)
        assert job is not None
        return job

    def kill_at(self, job_id: str, step: int, timeline: Timeline) -> int:
        """Kills the runner once it is at a step; the steps that this costs."""
        job = self.reach(job_id, step)
        token = f"{self._settings.instance}:{job_id}:{job.fence}:train-0"
        for pid in processes_with_token(token):
            os.kill(pid, signal.SIGKILL)
        killed = wait_for(lambda: row if (row := self.row(job_id)).fence != job.fence or row.state != "running" else 0)
        kept = max(killed.ckpt_step, 0)
        reached = max(self._steps(job), default=kept)
        timeline.say(f"killed at step {reached}, checkpoint at {kept}")
        return reached - kept

    def stop_at(self, job_id: str, step: int, worker: Any, timeline: Timeline) -> int:
        """SIGTERM of the worker at a step, and another one in its place; the steps that this costs."""
        job = self.reach(job_id, step)
        assert worker.stop(60) == 0
        stopped = self.row(job_id)
        assert (stopped.state, stopped.attempt, stopped.exit_code) == ("queued", 0, 75)
        reached = max(self._steps(job))
        timeline.say(f"stopped at step {reached}, checkpoint at {stopped.ckpt_step}")
        self.start(worker)
        return reached - stopped.ckpt_step

    def pause(self, job_id: str) -> int:
        """Pauses, and waits until the run is gone; the step of the checkpoint that it left."""
        token = f"{self._settings.instance}:{job_id}:{self.row(job_id).fence}:train-0"
        assert self._api.post(f"/jobs/{job_id}/pause").status_code == 202
        wait_for(lambda: self._api.get(f"/jobs/{job_id}").json()["status"] == "paused", 60)
        assert not processes_with_token(token)
        return self.row(job_id).ckpt_step

    def flip_a_bit(self, job_id: str, step: int) -> None:
        """In the weights of a checkpoint."""
        checkpoints = self._api.get(f"/jobs/{job_id}/checkpoints").json()["data"]
        (path,) = (checkpoint["path"] for checkpoint in checkpoints if checkpoint["step"] == step)
        weights = self._storage.root / path / "adapter_model.safetensors"
        damaged = bytearray(weights.read_bytes())
        damaged[-1] ^= 1
        weights.write_bytes(damaged)

    def resume(self, job_id: str) -> None:
        assert self._api.post(f"/jobs/{job_id}/resume").status_code == 200

    def history(self, job_id: str) -> list[dict[str, Any]]:
        answer = self._api.get(f"/jobs/{job_id}/events", params={"limit": 1000, "order": "asc"})
        return list(answer.json()["data"])

    def start(self, worker: Any) -> None:
        """With a spare runner, so that twenty starts cost twenty moments."""
        models = str(self._base.parent)
        worker.start(TUNESMITH_SLOTS="train:1,light:1", TUNESMITH_MODEL_ROOTS=models, TUNESMITH_WARM_RUNNERS="1")

    def _steps(self, attempt: Job) -> list[int]:
        """Every step that an attempt wrote into its journal; the row hears of them twice a second."""
        journal = self._storage.attempt_dir(attempt.id, attempt.fence) / "events.jsonl"
        found = journal.read_bytes() if journal.exists() else b""
        lines = [json.loads(line) for line in found.split(b"\n")[:-1]]
        return [line["step"] for line in lines if line["kind"] in ("metric", "progress")]

    def weights(self, job_id: str) -> str:
        (artifact,) = self._api.get(f"/jobs/{job_id}").json()["artifact_ids"]
        return sha256_of(self._storage.artifact_dir(artifact) / "adapter_model.safetensors")


@pytest.fixture
def runs(worker: Any, api: TestClient, database: Database, storage: Storage, settings: Settings, models: Path) -> Runs:
    base = make_model(models / "trainable")
    runs = Runs(api, database, storage, settings, base)
    runs.start(worker)
    return runs


def campaign(runs: Runs, until: Callable[..., Job], timeline: Timeline, kills: tuple[int, ...], seed: int) -> None:
    """A run for each number, killed so often."""
    straight = runs.submit("straight")
    until(straight, "succeeded", seconds=120)
    dice = random.Random(seed)
    equal, costs = 0, []
    for number, times in enumerate(kills):
        job_id = runs.submit(f"crooked{number}")
        costs += [runs.kill_at(job_id, step, timeline) for step in sorted(dice.sample(range(1, STEPS - SAVE), times))]
        job = until(job_id, "succeeded", seconds=120)
        assert job.fence > times
        equal += times * (runs.weights(job_id) == runs.weights(straight))
    # One interval, and what is computed while the checkpoint at its end is committed: at these short steps that may be
    # as much again, and no more, because a save waits for the commit before it.
    timeline.bound("P7", f"steps lost by a kill, a checkpoint every {SAVE}", max(costs), 2 * SAVE, "steps")
    timeline.count("P7", "kills after which the final weights equal the uninterrupted run's", equal, sum(kills))


@pytest.mark.timeout(400)
def test_three_random_kills(runs: Runs, until: Callable[..., Job], timeline: Timeline) -> None:
    """Cases 6 and 55: one run, killed three times, paused, and robbed of its newest checkpoint."""
    straight = runs.submit("straight", algorithm="slow_sft", pause=0)
    until(straight, "succeeded", seconds=120)
    job_id = runs.submit("crooked", algorithm="slow_sft", pause=0.03)
    steps = sorted(random.Random(1).sample(range(1, STEPS // 2), 3))
    costs = [runs.kill_at(job_id, step, timeline) for step in steps]
    timeline.bound("P7", f"steps lost by a kill, a checkpoint every {SAVE}", max(costs), 2 * SAVE, "steps")

    runs.reach(job_id, STEPS // 2 + SAVE)
    newest = runs.pause(job_id)
    runs.flip_a_bit(job_id, newest)
    runs.resume(job_id)
    until(job_id, "succeeded", seconds=120)

    history = runs.history(job_id)
    codes = [event["code"] for event in history]
    once = ("job_paused", "checkpoint_rejected", "job_resumed")
    assert {code: codes.count(code) for code in once} == dict.fromkeys(once, 1)
    assert codes.count("runner_killed") == len(steps)
    assert [event["seq"] for event in history] == list(range(1, len(history) + 1))
    equal = len(steps) * (runs.weights(job_id) == runs.weights(straight))
    timeline.count("P7", "kills after which the final weights equal the uninterrupted run's", equal, len(steps))


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_twenty_random_kills(runs: Runs, until: Callable[..., Job], timeline: Timeline) -> None:
    """Sixteen runs, two of which are killed three times."""
    campaign(runs, until, timeline, kills=(1,) * 14 + (3,) * 2, seed=2)


def stops(runs: Runs, worker: Any, until: Callable[..., Job], timeline: Timeline, times: tuple[int, ...]) -> None:
    """A run for each number, whose worker is asked to stop so often: slow ones, which do not end meanwhile."""
    slowly = {"algorithm": "slow_sft", "pause": 0.05, "training": {**TRAINING, "max_steps": SLOW_STEPS}}
    dice = random.Random(3)
    lost: list[int] = []
    ends: list[str] = []
    for number, count in enumerate(times):
        job_id = runs.submit(f"stopped{number}", **slowly)
        steps = sorted(dice.sample(range(1, SLOW_STEPS // 2), count))
        lost += [runs.stop_at(job_id, step, worker, timeline) for step in steps]
        job = until(job_id, "succeeded", seconds=120)
        assert (job.attempt, job.fence) == (1, count + 1)
        ends.append(runs.weights(job_id))
    timeline.bound("P10", "steps lost by SIGTERM of a worker", max(lost), 1, "steps")
    timeline.count(
        "P10", "stops that lost no attempt and at most a step", sum(0 <= cost <= 1 for cost in lost), sum(times)
    )
    assert len(set(ends)) == 1, "however often and wherever they were stopped"


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_twenty_random_stops(runs: Runs, worker: Any, until: Callable[..., Job], timeline: Timeline) -> None:
    """Five runs, one of them never stopped."""
    stops(runs, worker, until, timeline, times=(0, 3, 5, 6, 6))
