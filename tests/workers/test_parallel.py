"""A real run on two ranks (gloo, CPU): it learns what one rank would, stops and goes on together, and dies together."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from safetensors.torch import load_file
from sqlalchemy import select

from app.db import Database
from app.discovery import discover
from app.models import Artifact, Checkpoint, Job, JobEvent, Metric
from app.processes import processes_of_instance
from app.queue import SilentDoorbell
from app.settings import Settings
from app.storage import Storage
from tests.support import on_sqlite, wait_for
from tests.workers.conftest import conversation, make_model
from workers.slots import Place, SlotThread, register
from workers.supervisor import House

pytestmark = [on_sqlite, pytest.mark.timeout(400)]
PLACES = (Place("train-0", "train"), Place("train-1", "train"), Place("light-0", "light"))


class Runs:
    """Posts runs, and looks at them."""

    def __init__(self, api: TestClient, house: House, base: Path, file_id: str) -> None:
        self.api = api
        self.house = house
        self.model: dict[str, Any] = {
            "model_name_or_path": str(base),
            "peft_config": {"r": 4, "lora_dropout": 0.0},
        }
        self._spec = {
            "type": "train",
            "model": self.model,
            "dataset": {"file": file_id},
        }

    def submit(self, algorithm: str = "sft", *, ranks: int = 2, training: dict[str, Any], **fields: Any) -> str:
        """A run of eight rows a step."""
        sizes = {"per_device_train_batch_size": 8 // ranks, "learning_rate": 1e-2, "save_steps": 2}
        spec = {**self._spec, "algorithm": algorithm, "resources": {"gpus": ranks}, "training": {**sizes, **training}}
        answer = self.api.post("/jobs", json={**spec, **fields})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def row(self, job_id: str) -> Job:
        with self.house.database.read() as session:
            return session.get_one(Job, job_id)

    def until(self, job_id: str, *states: str, seconds: float = 150) -> Job:
        wait_for(lambda: self.row(job_id).state in (*states, "failed"), seconds)
        job = self.row(job_id)
        assert job.state in states, job.error_detail
        return job

    def until_step(self, job_id: str, step: int) -> None:
        wait_for(lambda: self.row(job_id).ckpt_step >= step or self.row(job_id).state == "failed", 150)
        assert self.row(job_id).state == "running", self.row(job_id).error_detail

    def ranks(self, job_id: str) -> list[int]:
        """Pids of the processes that train."""
        token = f"{self.house.settings.instance}:"
        found = []
        for pid in processes_of_instance(self.house.settings.instance):
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            if any(entry.startswith("RANK=") for entry in variables) and any(token in entry for entry in variables):
                found.append(pid)
        return found

    def losses(self, job_id: str) -> dict[int, float]:
        with self.house.database.read() as session:
            rows = session.scalars(select(Metric).where(Metric.job_id == job_id, Metric.name == "loss"))
            return {row.step: float(row.value or 0) for row in rows}

    def weights(self, job_id: str) -> dict[str, Any]:
        with self.house.database.read() as session:
            artifact = session.scalars(select(Artifact).where(Artifact.job_id == job_id)).one()
        name = "adapter_model.safetensors" if artifact.kind == "adapter" else "model.safetensors"
        return dict(load_file(self.house.storage.artifact_dir(artifact.id) / name))

    def codes(self, job_id: str) -> list[str]:
        with self.house.database.read() as session:
            query = select(JobEvent.code).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)
            return list(session.scalars(query))


@pytest.fixture
def runs(
    api: TestClient,
    settings: Settings,
    database: Database,
    storage: Storage,
    models: Path,
    upload: Callable[..., Any],
) -> Iterator[Runs]:
    base = make_model(models / "trainable")
    rows = "".join(json.dumps({"messages": conversation(number)}) + "\n" for number in range(96))
    file_id = upload(rows.encode()).json()["id"]
    calm = settings.model_copy(update={"grace_seconds": 60.0, "lease_seconds": 30.0})
    house = House(calm, database, storage, discover(settings.packages), SilentDoorbell(), "w", threading.Event())
    register(house, PLACES)
    threads = [SlotThread(house, place) for place in PLACES]
    for thread in threads:
        thread.start()
    yield Runs(api, house, base, file_id)
    house.stopping.set()
    for thread in threads:
        thread.bell.set()
        thread.join(90)


def test_two_ranks_learn_what_one_does_also_after_a_pause(runs: Runs, api: TestClient) -> None:
    """The same rows a step, whoever computes them; a run that both ranks left and took up ends with the same bytes."""
    alone = runs.submit(ranks=1, training={"max_steps": 8})
    straight = runs.submit(training={"max_steps": 8})
    runs.until(alone, "succeeded")
    runs.until(straight, "succeeded")
    assert runs.losses(straight) == pytest.approx(runs.losses(alone), rel=1e-3)
    mine = runs.weights(straight)
    for name, tensor in runs.weights(alone).items():
        assert tensor.sub(mine[name]).abs().max() < 1e-3, name

    crooked = runs.submit("slow_sft", training={"max_steps": 8}, pause=1.0)
    runs.until_step(crooked, 2)
    assert api.post(f"/jobs/{crooked}/pause").status_code == 202
    job = runs.until(crooked, "queued", seconds=60)
    assert (job.exit_code, job.attempt) == (75, 0)
    assert not runs.ranks(crooked)
    with runs.house.database.read() as session:
        newest = session.scalars(
            select(Checkpoint).where(Checkpoint.job_id == crooked).order_by(Checkpoint.step.desc())
        ).first()
    assert newest is not None
    kept = sorted(path.name for path in (runs.house.storage.root / newest.path).glob("rng_state*"))
    assert kept == ["rng_state_0.pth", "rng_state_1.pth"]
    assert runs.house.storage.checkpoint_faults(runs.house.storage.root / newest.path) == []
    assert api.post(f"/jobs/{crooked}/resume").status_code == 200
    runs.until(crooked, "succeeded")
    again = runs.weights(crooked)
    assert all(bool(tensor.equal(again[name])) for name, tensor in mine.items())
    assert "job_restarted" in runs.codes(crooked)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_in_parts_learn_what_whole_ones_do_also_after_a_pause(runs: Runs, api: TestClient, method: str) -> None:
    """FSDP: artifacts and checkpoints hold whole tensors."""
    model = (
        runs.model if method == "lora" else {"model_name_or_path": runs.model["model_name_or_path"], "use_peft": False}
    )
    rate = {"learning_rate": 1e-2 if method == "lora" else 1e-3, "max_steps": 6}
    whole = runs.submit(training={**rate, "parallelism": "ddp"}, model=model)
    runs.until(whole, "succeeded")
    parts = runs.submit("slow_sft", training={**rate, "parallelism": "fsdp"}, pause=1.0, model=model)
    runs.until_step(parts, 2)
    assert api.post(f"/jobs/{parts}/pause").status_code == 202
    runs.until(parts, "queued", seconds=60)
    assert api.post(f"/jobs/{parts}/resume").status_code == 200
    job = runs.until(parts, "succeeded")
    assert runs.losses(parts) == pytest.approx(runs.losses(whole), rel=1e-3)
    mine, others = runs.weights(parts), runs.weights(whole)
    assert set(mine) == set(others)
    for name, tensor in others.items():
        assert tensor.sub(mine[name]).abs().max() < 1e-3, name
    assert job.result is not None
    assert job.result["steps"] == 6


def test_memory_that_runs_out_on_one_rank_makes_all_try_again(runs: Runs) -> None:
    job_id = runs.submit("hungry", training={"max_steps": 3}, fits=2, only_rank=1)
    job = runs.until(job_id, "succeeded")
    assert job.resolved_spec["training"]["per_device_train_batch_size"] == 2
    assert job.resolved_spec["training"]["gradient_accumulation_steps"] == 2
    assert runs.codes(job_id).count("out_of_memory_adjusted") == 1


@pytest.mark.parametrize("end", ["killed", "cancelled", "nan"])
def test_ranks_end_together(runs: Runs, api: TestClient, end: str) -> None:
    """Within 30 s of the death of one, within the grace of a cancellation, and for the reason that one of them has."""
    spoilt = {"spoilt_rank": 1} if end == "nan" else {}
    job_id = runs.submit("slow_sft", training={"max_steps": 500}, pause=0.2, retry={"max_attempts": 1}, **spoilt)
    if end == "nan":
        wait_for(lambda: runs.row(job_id).state == "failed", 150)
        assert runs.row(job_id).error_code == "non_finite_loss"
    else:
        runs.until_step(job_id, 2)
        begun = time.monotonic()
        ranks = set(runs.ranks(job_id))
        if end == "killed":
            os.kill(max(ranks), signal.SIGKILL)
            # It got on since it began, so it is tried again at once, maybe before it is seen to wait, and counts anew.
            wait_for(lambda: runs.row(job_id).state in ("failed", "queued") or runs.row(job_id).fence > 1, 45)
        else:
            assert api.post(f"/jobs/{job_id}/cancel").status_code == 202
            wait_for(lambda: runs.row(job_id).state == "cancelled", 45)
        assert time.monotonic() - begun < 30
        assert wait_for(lambda: not ranks & set(runs.ranks(job_id)), 15)
        return
    assert wait_for(lambda: not runs.ranks(job_id), 15)
