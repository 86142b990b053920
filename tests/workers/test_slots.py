"""Slots: which there are, that one worker holds each, and what a new holder does about the old one's job."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from app.db import Database
from app.discovery import discover
from app.jobs import claims, repository
from app.models import Job, JobEvent, Slot, Worker, new_id, now
from app.processes import TOKEN, processes_with_token
from app.projects.repository import ensure_default
from app.queue import SilentDoorbell
from app.settings import Settings, parse_slots
from app.storage import Storage
from tests.support import on_sqlite, wait_for
from workers.slots import Place, SlotLock, SlotTaken, SlotThread, gpus, lock_all, register, slots_of
from workers.supervisor import House


@pytest.fixture
def make_house(settings: Settings, database: Database, storage: Storage) -> Callable[[str], House]:
    """A worker's house by its id."""

    def make(worker_id: str) -> House:
        catalog = discover(("tests.plugs",))
        return House(settings, database, storage, catalog, SilentDoorbell(), worker_id, threading.Event())

    return make


@pytest.fixture
def add(database: Database) -> Callable[..., str]:
    """A queued job that succeeds at once."""

    def add(**columns: Any) -> str:
        spec = {"type": "sleepy", "experiment_name": "nap", "mode": "ok"}
        with database.write() as session:
            ensure_default(session)
            values = {"type": "sleepy", "experiment_name": "nap", "spec": spec, "resolved_spec": spec}
            job = Job(id=new_id("job"), project_id="proj-default", spec_sha256="", **{**values, **columns})
            job.slot_class = columns.get("slot_class", "light")
            repository.add(session, job)
            return job.id

    return add


NVIDIA_SMI = """#!/bin/sh
[ "$1" = --query-gpu=index,name,memory.total ] && echo '0, NVIDIA H200, 143771' && echo '1, Odd, one, [N/A]'
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that answers like the NVIDIA driver's, of two GPUs."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    fake = tmp_path / "nvidia-smi"
    fake.write_text(NVIDIA_SMI)
    fake.chmod(0o755)
    return fake


def places(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {place.slot_id: dict(place.facts) for place in slots_of(Settings(data_dir=tmp_path, **changes), gpus())}


def test_slots_by_default_and_as_told(driver: Path, tmp_path: Path) -> None:
    first = {"gpu": 0, "name": "NVIDIA H200", "vram_gb": 150.8}
    second = {"gpu": 1, "name": "Odd, one"}
    assert places(tmp_path, slots="train:1,light:2") == {"train-0": {}, "light-0": {}, "light-1": {}}
    assert places(tmp_path) == {"gpu-0": first, "gpu-1": second, "light-0": {}}
    driver.write_text("#!/bin/sh\nexit 9\n")
    assert gpus() == []
    assert list(places(tmp_path)) == ["train-0", "serve-0", "serve-1", "light-0"]
    assert places(tmp_path, slots="gpu:1") == {"gpu-0": {"gpu": 0}}
    driver.unlink()
    assert gpus() == []


def test_a_shared_gpu_has_sub_slots_and_a_reserved_one_has_not(driver: Path, tmp_path: Path) -> None:
    first = {"gpu": 0, "name": "NVIDIA H200", "vram_gb": 150.8}
    second = {"gpu": 1, "name": "Odd, one"}
    assert places(tmp_path, share_gpu=2, reserved_slots=1) == {
        "gpu-0.0": first,
        "gpu-0.1": first,
        "gpu-1": {**second, "reserved": True},
        "light-0": {},
    }


@on_sqlite
def test_the_sub_slots_of_a_gpu_have_one_holder(settings: Settings) -> None:
    """However two workers share their GPUs, one GPU has one of them."""
    held = lock_all(settings, [Place("gpu-0.0", "gpu"), Place("gpu-0.1", "gpu")])
    assert len(held) == 1
    with pytest.raises(SlotTaken, match="gpu-0"):
        lock_all(settings, [Place("gpu-0", "gpu")])
    held[0].release()


@pytest.mark.parametrize("text", ["", "train", "train:x", "cook:1", "train:1;light:1", "light:0"])
def test_slots_that_make_no_sense(text: str) -> None:
    with pytest.raises(ValueError, match="slot"):
        parse_slots(text)


@on_sqlite
def test_a_slot_has_one_holder(settings: Settings) -> None:
    lock = SlotLock(settings, "light-0")
    with pytest.raises(SlotTaken, match="light-0"):
        SlotLock(settings, "light-0")
    SlotLock(settings, "light-1").release()
    lock.release()
    SlotLock(settings, "light-0").release()


@on_sqlite
def test_a_dead_process_holds_no_slot(settings: Settings) -> None:
    code = (
        "import os, sys, time; from app.settings import Settings; from workers.slots import SlotLock;"
        "lock = SlotLock(Settings(), 'light-0'); print('up', flush=True); time.sleep(600)"
    )
    env = {**os.environ, "TUNESMITH_DATA_DIR": str(settings.data_dir), "TUNESMITH_RUN_DIR": str(settings.run_dir)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as output:
        assert output.readline() == b"up\n"
    with pytest.raises(SlotTaken):
        SlotLock(settings, "light-0")
    process.kill()
    process.wait()
    SlotLock(settings, "light-0").release()


def test_a_new_holder_takes_over_the_job_of_the_dead(
    make_house: Callable[[str], House], add: Callable[..., str], database: Database
) -> None:
    old, other = make_house("old"), make_house("other")
    register(old, [Place("light-0", "light"), Place("light-1", "light")])
    with database.write() as session:
        session.get_one(Worker, "old").host = socket.gethostname()
    ids = [add() for _ in range(3)]
    with database.write() as session:
        session.add(Worker(id="far", host="far-away", pid=1, facts={"instance": old.settings.instance}))
    claimed = []
    for worker_id, slot_id in (("old", "light-0"), ("old", "light-1"), ("far", "light-0")):
        with database.write() as session:
            claimed.append(claims.claim(session, worker_id, slot_id, ["light"]))
    mine, elsewhere, far = claimed
    assert mine
    assert elsewhere
    assert far
    register(other, [Place("light-0", "light")])
    with database.read() as session:
        jobs = {job.id: job for job in session.scalars(select(Job))}
        workers = {worker.id: worker.stopped_at for worker in session.scalars(select(Worker))}
        slots = {(slot.worker_id, slot.slot_id): slot.job_id for slot in session.scalars(select(Slot))}
        codes = list(session.scalars(select(JobEvent.code).where(JobEvent.job_id == mine.id).order_by(JobEvent.seq)))
    assert set(jobs) == set(ids)
    assert (jobs[mine.id].state, jobs[mine.id].fence, jobs[mine.id].worker_id) == ("queued", 2, None)
    # Only the slot that was taken proves something; the others are left to the lease.
    assert jobs[elsewhere.id].state == "running"
    assert jobs[far.id].state == "running"
    assert workers["old"] is not None
    assert (workers["other"], workers["far"]) == (None, None)
    assert slots[("old", "light-0")] is None
    assert codes == ["job_queued", "job_started", "worker_lost"]


@on_sqlite
def test_what_the_dead_left_running_is_ended(make_house: Callable[[str], House]) -> None:
    house = make_house("new")
    tokens = [
        f"{house.settings.instance}:job-1:1:light-0",
        f"{house.settings.instance}:job-2:1:light-1",
        "x:j:1:light-0",
    ]
    processes = [subprocess.Popen(["sleep", "600"], env={TOKEN: token}, start_new_session=True) for token in tokens]
    try:
        register(house, [Place("light-0", "light")])
        assert processes[0].wait(10) == -signal.SIGKILL
        assert processes_with_token(tokens[1]) == [processes[1].pid]
        assert processes_with_token(tokens[2]) == [processes[2].pid]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture
def slot(make_house: Callable[[str], House]) -> Iterator[SlotThread]:
    house = make_house("w")
    register(house, [Place("light-0", "light")])
    thread = SlotThread(house, Place("light-0", "light"))
    yield thread
    house.stopping.set()
    thread.bell.set()
    if thread.is_alive():
        thread.join(30)


def state(database: Database, job_id: str) -> str:
    with database.read() as session:
        return session.get_one(Job, job_id).state


@on_sqlite
def test_a_slot_runs_what_waits_and_hears_the_bell(
    slot: SlotThread, add: Callable[..., str], database: Database
) -> None:
    first = add()
    slot.start()
    wait_for(lambda: state(database, first) == "succeeded", 30)
    later = add()
    other = add(slot_class="train")
    slot.bell.set()
    wait_for(lambda: state(database, later) == "succeeded", 30)
    assert state(database, other) == "queued"


@on_sqlite
def test_a_slot_looks_by_itself(
    slot: SlotThread, add: Callable[..., str], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that is away costs seconds, not jobs."""
    monkeypatch.setattr("workers.slots.IDLE_SECONDS", 1.0)
    slot.start()
    job_id = add()
    wait_for(lambda: state(database, job_id) == "succeeded", 30)


@on_sqlite
def test_a_job_that_cannot_be_supervised_does_not_cost_the_slot(
    slot: SlotThread, add: Callable[..., str], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = add(created_at=now())
    real = slot.house.storage.attempt_dir

    def attempt_dir(job_id: str, fence: int) -> Path:
        if job_id == broken:
            raise RuntimeError("a bug of ours")
        return real(job_id, fence)

    monkeypatch.setattr(slot.house.storage, "attempt_dir", attempt_dir)
    good = add()
    slot.start()
    wait_for(lambda: state(database, good) == "succeeded", 30)
    assert state(database, broken) == "running"  # nobody beats for it: it is reaped


@on_sqlite
@pytest.mark.parametrize(("gpus", "devices"), [(1, "3"), (0, "")])
def test_a_run_sees_its_own_gpu_alone(
    make_house: Callable[[str], House], add: Callable[..., str], tmp_path: Path, gpus: int, devices: str
) -> None:
    house = make_house("w")
    place = Place("gpu-3.1", "gpu", {"gpu": 3, "vram_gb": 24.0})
    register(house, [place])
    thread = SlotThread(house, place)
    marker = tmp_path / "marker"
    spec = {"type": "sleepy", "experiment_name": "nap", "mode": "saves_itself", "marker": str(marker)}
    add(slot_class="train", gpus=gpus, spec=spec, resolved_spec=spec)
    thread.start()
    try:
        pid = wait_for(lambda: marker.exists() and marker.read_text(), 30)
        assert f"\0CUDA_VISIBLE_DEVICES={devices}\0" in "\0" + Path(f"/proc/{pid}/environ").read_text()
    finally:
        house.stopping.set()
        thread.bell.set()
        thread.join(60)
