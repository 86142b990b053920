"""Several ranks under torchrun, on the CPU: one result, one way to stop, and no rank that outlives the others."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from app.db import Database
from app.discovery import discover
from app.jobs import repository
from app.models import Artifact, Job, JobEvent, Metric, Slot, new_id, now
from app.processes import kill_holders, processes_of_instance, processes_with_token
from app.projects.repository import ensure_default
from app.queue import SilentDoorbell
from app.settings import Settings
from app.storage import Storage
from tests.support import on_sqlite, wait_for
from workers.slots import Place, SlotThread, register
from workers.supervisor import House

pytestmark = on_sqlite
CPU = (Place("train-0", "train"), Place("train-1", "train"))
GPUS = (Place("gpu-0", "gpu", {"gpu": 4}), Place("gpu-1", "gpu", {"gpu": 6}))


class NarrowSettings(Settings):
    """Settings with the test operations alone."""

    @property
    def packages(self) -> tuple[str, ...]:
        return ("tests.plugs",)


class Run:
    """A job of two ranks on a worker with two train slots."""

    def __init__(self, house: House, job_id: str, marker: Path) -> None:
        self.house = house
        self.job_id = job_id
        self.marker = marker

    def row(self) -> Job:
        with self.house.database.read() as session:
            return session.get_one(Job, self.job_id)

    def ranks(self) -> list[int]:
        """Their pids, once both are under way."""
        files = [Path(f"{self.marker}.{rank}") for rank in (0, 1)]
        wait_for(lambda: all(file.exists() and file.read_text() for file in files), 90)
        return [int(file.read_text()) for file in files]

    def parent(self) -> int:
        """The pid of ``workers.ranks``: the parent of torchrun, which is the parent of the ranks."""
        return parent_of(parent_of(self.ranks()[0]))

    def left(self) -> list[int]:
        return processes_of_instance(self.house.settings.instance)

    def until(self, state: str, seconds: float = 60) -> Job:
        """The row in that state; then nothing of the attempt may be left."""
        wait_for(lambda: self.row().state == state, seconds)
        wait_for(lambda: not self.left(), 15)
        with self.house.database.read() as session:
            assert not any(slot.job_id for slot in session.scalars(select(Slot)))
        return self.row()

    def codes(self) -> list[str]:
        with self.house.database.read() as session:
            query = select(JobEvent.code).where(JobEvent.job_id == self.job_id).order_by(JobEvent.seq)
            return list(session.scalars(query))


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture
def start(settings: Settings, database: Database, storage: Storage, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """``start(**spec)``: the job, with both slots' threads running."""
    narrow = NarrowSettings.model_validate({**settings.model_dump(), "grace_seconds": 60.0})
    house = House(narrow, database, storage, discover(("tests.plugs",)), SilentDoorbell(), "w", threading.Event())
    threads: list[SlotThread] = []

    def start(places: Sequence[Place] = CPU, **changes: Any) -> Run:
        register(house, places)
        threads.extend(SlotThread(house, place) for place in places)
        marker = tmp_path / "marker"
        spec = {"type": "gathering", "experiment_name": "sum", "marker": str(marker), **changes}
        with database.write() as session:
            ensure_default(session)
            job = Job(
                id=new_id("job"),
                project_id="proj-default",
                type="gathering",
                experiment_name="sum",
                spec=spec,
                spec_sha256="",
                resolved_spec=spec,
                slot_class="train",
                gpus=2,
                max_attempts=1,
            )
            repository.add(session, job)
        for thread in threads:
            thread.start()
        return Run(house, job.id, marker)

    yield start
    house.stopping.set()
    for thread in threads:
        thread.bell.set()
        if thread.is_alive():
            thread.join(90)


def test_two_ranks_leave_one_result(start: Callable[..., Run], database: Database, storage: Storage) -> None:
    run = start(rounds=3)
    job = run.until("succeeded", 120)
    assert job.result is not None
    assert (job.result["sum"], job.result["size"]) == (3.0, 2)
    with database.read() as session:
        artifact = session.scalars(select(Artifact)).one()
        metrics = [(row.step, row.value) for row in session.scalars(select(Metric).order_by(Metric.step))]
    assert sorted(path.name for path in storage.artifact_dir(artifact.id).iterdir()) == ["MANIFEST.json", "rank0.txt"]
    assert metrics == [(1, 3.0), (2, 3.0), (3, 3.0)]
    assert run.codes() == ["job_queued", "job_started", "job_complete"]


def test_a_pause_stops_both_ranks_and_gives_the_attempt_back(start: Callable[..., Run], database: Database) -> None:
    """SIGTERM to the parent: every rank saves itself, and 75 comes through torchrun."""
    run = start(rounds=100_000)
    run.ranks()
    with database.write() as session:
        session.get_one(Job, run.job_id).pause_requested_at = now()
    job = run.until("queued")
    assert (job.exit_code, job.attempt) == (75, 0)
    assert job.paused_at is not None
    assert run.codes()[-1] == "job_paused"


def test_who_makes_room_goes_on_afterwards(start: Callable[..., Run], database: Database) -> None:
    run = start(rounds=100_000)
    run.ranks()
    with database.write() as session:
        session.get_one(Job, run.job_id).preempt_for = "job-urgent"
    wait_for(lambda: run.codes().count("job_started") == 2, 60)
    job = run.row()
    assert (job.state, job.attempt, job.preempt_for) == ("running", 1, None)
    assert run.codes()[2] == "job_preempted"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_attempt(start: Callable[..., Run], rank: int) -> None:
    run = start(rounds=100_000)
    pid = run.ranks()[rank]
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    job = run.until("failed", 45)
    assert time.monotonic() - killed < 30
    assert (job.error_code, job.exit_code) == ("killed", -9)


def test_a_rank_that_does_not_hear_is_ended_with_the_others(start: Callable[..., Run]) -> None:
    """Rank 0 hangs where no signal reaches it, and rank 1 is gone."""
    run = start(rounds=100_000, mode="hang")
    pid = run.ranks()[1]
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    run.until("failed", 45)
    assert time.monotonic() - killed < 30


def test_the_reason_of_another_rank_is_told(start: Callable[..., Run]) -> None:
    job = start(rounds=100_000, mode="refuse").until("failed", 120)
    assert (job.error_code, job.exit_code) == ("oom", 69)
    assert job.error_detail is not None
    assert job.error_detail["hint"] == "Ask for less."


def test_nothing_is_left_when_the_parent_is_killed(start: Callable[..., Run]) -> None:
    run = start(rounds=100_000)
    os.kill(run.parent(), signal.SIGKILL)
    job = run.until("failed", 30)
    assert (job.error_code, job.exit_code) == ("killed", -9)


WORKER = """
import os, sys, time
from pathlib import Path
from workers.child import Child
child = Child("workers.ranks", Path(sys.argv[1]), sys.argv[2], dict(os.environ))
time.sleep(600)
"""


def test_nothing_is_left_when_the_worker_is_killed(start: Callable[..., Run], tmp_path: Path) -> None:
    """The parent dies with the worker, at once and without a word; torchrun and the ranks must not outlive it."""
    run = start(rounds=100_000)
    run.ranks()
    (told,) = (run.house.settings.data_dir / "jobs" / run.job_id).glob("*/attempt.json")
    attempt = json.loads(told.read_bytes())
    attempt["spec"]["marker"] = str(tmp_path / "second")
    folder = tmp_path / "attempt"
    folder.mkdir()
    (folder / "attempt.json").write_text(json.dumps(attempt))
    token = f"{new_id('test')}:job:1:train-0"
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(folder), token], cwd=Path(__file__).parents[2])
    try:
        markers = [tmp_path / f"second.{rank}" for rank in (0, 1)]
        wait_for(lambda: all(marker.exists() and marker.read_text() for marker in markers), 90)
        assert len(processes_with_token(token)) >= 4  # the parent, torchrun, two ranks
        # Its thread that watches the lifeline may or may not be faster than the signal: here it is not.
        os.kill(parent_of(parent_of(int(markers[0].read_text()))), signal.SIGSTOP)
        worker.kill()
        worker.wait()
        wait_for(lambda: not processes_with_token(token), 10)
    finally:
        worker.kill()
        kill_holders(token)


def test_every_rank_sees_every_gpu_of_the_job(start: Callable[..., Run]) -> None:
    run = start(GPUS, rounds=100_000)
    for pid in run.ranks():
        variables = dict(
            item.split("=", 1) for item in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in item
        )
        assert sorted(variables["CUDA_VISIBLE_DEVICES"].split(",")) == ["4", "6"]
        assert variables["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
