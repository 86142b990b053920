"""A worker is killed at every point that matters; the next one goes on where it stood, and nothing is had twice."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.artifacts.garbage import MIN_AGE, Collector
from app.crashpoints import VARIABLE
from app.db import Database
from app.discovery import discover
from app.models import Artifact, Job
from app.processes import processes_of_instance, processes_with_token
from app.queue import Doorbell, SilentDoorbell
from app.reconciler import Reconciler
from app.settings import Settings
from app.storage import Storage
from tests.faults.timeline import Timeline
from tests.faults.valkey import Valkey
from tests.plugs import plodder
from tests.support import on_sqlite, train_spec, wait_for

pytestmark = [pytest.mark.fault, on_sqlite]
Until = Callable[..., Job]
LEASE = 3.0
REQUEUED_WITHIN = LEASE + 15
"""As much beyond the lease as the promise of 45 s has beyond the default of 30 s."""


class Scene:
    """What the tests below look at."""

    def __init__(
        self, api: TestClient, database: Database, storage: Storage, settings: Settings, tmp_path: Path
    ) -> None:
        self.api = api
        self.database = database
        self.storage = storage
        self.settings = settings
        self.gates = tmp_path / "gates"
        self.gates.mkdir()

    def submit(self, **spec: Any) -> str:
        answer = self.api.post("/jobs", json={"type": "sleepy", **spec})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def plod(self, model: Path, file_id: str, **spec: Any) -> str:
        """A run of ``tests/plugs/plodder.py``."""
        return self.submit(**train_spec(str(model), file_id, algorithm="plodder", gates=str(self.gates), **spec))

    def row(self, job_id: str) -> Job:
        with self.database.read() as session:
            return session.get_one(Job, job_id)

    def codes(self, job_id: str) -> list[str]:
        """Its history, oldest first."""
        answer = self.api.get(f"/jobs/{job_id}/events", params={"order": "asc", "limit": 100})
        return [event["code"] for event in answer.json()["data"]]

    def artifacts(self) -> list[Artifact]:
        with self.database.read() as session:
            return list(session.scalars(select(Artifact)))

    def folders(self) -> set[str]:
        """Names under ``artifacts/``, with or without a row."""
        folder = self.settings.data_dir / "artifacts"
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

    def weights(self, job_id: str) -> bytes:
        (artifact,) = self.api.get(f"/jobs/{job_id}").json()["artifact_ids"]
        assert self.storage.verify(artifact) == []
        return (self.storage.artifact_dir(artifact) / "adapter_model.safetensors").read_bytes()

    def runners(self) -> list[int]:
        """Processes of any attempt."""
        return processes_of_instance(self.settings.instance)


@pytest.fixture
def scene(api: TestClient, database: Database, storage: Storage, settings: Settings, tmp_path: Path) -> Scene:
    return Scene(api, database, storage, settings, tmp_path)


def dies(worker: Any, point: str, **environment: str) -> None:
    """Starts a worker that kills itself at a point, and waits until it has."""
    worker.start(**{VARIABLE: point, **environment})
    assert worker.process.wait(40) == -signal.SIGKILL, worker.log()


@pytest.mark.long
def test_a_worker_that_dies_before_its_claim(worker: Any, scene: Scene, until: Until, timeline: Timeline) -> None:
    """Case 1. Nothing happened: the job is queued, and its first attempt is the next worker's."""
    job_id = scene.submit()
    dies(worker, "claim.before_commit")
    job = scene.row(job_id)
    assert (job.state, job.attempt, job.fence, job.worker_id) == ("queued", 0, 0, None)
    worker.start()
    with timeline.within("P3", "worker died before its claim → the next one runs the job", 20):
        until(job_id, "running", "succeeded", seconds=20)
    job = until(job_id, "succeeded")
    assert (job.attempt, job.fence) == (1, 1)
    assert scene.codes(job_id).count("job_started") == 1


def test_a_worker_that_dies_right_after_its_claim(worker: Any, scene: Scene, until: Until, timeline: Timeline) -> None:
    """Case 2. No runner was ever there; whoever watches gives the job back when the lease is over."""
    job_id = scene.submit()
    dies(worker, "claim.after_commit")
    job = scene.row(job_id)
    assert (job.state, job.attempt, job.fence) == ("running", 1, 1)
    assert not scene.storage.attempt_dir(job_id, 1).exists()
    assert scene.runners() == []
    reconciler = Reconciler(scene.settings, scene.database, discover(scene.settings.packages), SilentDoorbell())
    reconciler.start()
    try:
        with timeline.within("P6", f"worker dead → requeued by another process (lease {LEASE:g} s)", REQUEUED_WITHIN):
            job = until(job_id, "queued", seconds=REQUEUED_WITHIN)
    finally:
        reconciler.stop()
    assert (job.attempt, job.fence) == (1, 2)
    worker.start()
    job = until(job_id, "succeeded")
    assert (job.attempt, job.fence) == (2, 3)
    assert "worker_lost" in scene.codes(job_id)


def test_a_worker_that_dies_in_every_phase_of_a_run(
    worker: Any, scene: Scene, until: Until, models: Path, file_id: str, timeline: Timeline
) -> None:
    """Case 3. Staging, loading, training, saving, committing: in the end the bytes are those of a straight run."""
    environment = {"TUNESMITH_SLOTS": "train:1,light:1", "TUNESMITH_MODEL_ROOTS": str(models)}
    phases = ("staging", "loading", "training", "saving")
    for phase in phases:
        (scene.gates / phase).touch()
    crooked = scene.plod(models / "tiny", file_id)
    slowest, latest, died = 0.0, 0.0, 0.0
    for phase in phases:
        worker.start(**environment)
        pid = int(wait_for(lambda gate=scene.gates / phase: gate.read_text(), 40))
        running = until(crooked, "running")
        if died:
            latest = max(latest, time.monotonic() - died)
        assert pid in scene.runners()
        if phase == "training":
            wait_for(lambda: scene.row(crooked).ckpt_step == 20)
        died = time.monotonic()
        worker.kill()
        wait_for(lambda: scene.runners() == [], 15)
        slowest = max(slowest, time.monotonic() - died)
        timeline.say(f"killed while {phase}, attempt {running.attempt}, fence {running.fence}")
        (scene.gates / phase).unlink()
    dies(worker, "publish.before_rename", **environment)
    timeline.say("killed while committing")
    died = time.monotonic()
    assert scene.artifacts() == []
    worker.start(**environment)
    job = until(crooked, "succeeded")
    latest = max(latest, time.monotonic() - died)
    timeline.bound("P13", "worker killed in any phase → its runner is gone", slowest, at_most=15)
    timeline.bound("P6", "worker killed in any phase → the next attempt is at work (worker restarted)", latest, 45)

    straight = scene.plod(models / "tiny", file_id)
    until(straight, "succeeded")
    assert scene.weights(crooked) == scene.weights(straight) == expected(scene, job)
    codes = scene.codes(crooked)
    assert (codes.count("worker_lost"), codes.count("job_restarted")) == (5, 3)  # no checkpoint before the third
    left = {path.name for path in (scene.settings.data_dir / "jobs" / crooked).glob("a*/*")}
    assert not left & {"work", "out0.tmp"}, "what dead attempts were working at takes up the disk"
    steps = Path(f"{scene.gates}.steps").read_text().split()
    lost = len(steps) - 2 * plodder.STEPS
    timeline.bound("P7", f"steps lost by five deaths, a checkpoint every {plodder.SAVE}", lost, plodder.SAVE, "steps")


@pytest.mark.long
@pytest.mark.parametrize(
    "point",
    [
        "claim.before_commit:2",
        "claim.after_commit:2",
        "spawn.before:2",
        "spawn.after:2",
        "beat.before:3",
        "checkpoint.before_row",
        "checkpoint.before_row:2",
        "publish.before_manifest",
        "publish.before_rename",
        "publish.after_rename",
        "succeed.before_commit",
        "succeed.after_commit",
    ],
)
def test_a_worker_that_dies_at_any_point(
    point: str, worker: Any, scene: Scene, until: Until, models: Path, file_id: str
) -> None:
    """Cases 1 to 5. Of a run with two stages and four checkpoints."""
    environment = {"TUNESMITH_SLOTS": "train:1,light:1", "TUNESMITH_MODEL_ROOTS": str(models)}
    job_id = scene.plod(models / "tiny", file_id)
    dies(worker, point, **environment)
    worker.start(**environment)
    job = until(job_id, "succeeded")
    assert scene.weights(job_id) == expected(scene, job)
    assert len(scene.artifacts()) == 1


@pytest.mark.long
@pytest.mark.parametrize(
    "point",
    [
        "checkpoint.before_complete",
        "checkpoint.after_complete:2",
        "checkpoint.thinned",
        "requeue.before_commit",
        "requeue.after_commit",
    ],
)
def test_a_runner_that_dies_at_any_point(
    point: str, worker: Any, scene: Scene, until: Until, models: Path, file_id: str
) -> None:
    """Case 6. Its worker, which does so too when it commits what was made ready or gives the job back, is replaced."""
    environment = {"TUNESMITH_SLOTS": "train:1,light:1", "TUNESMITH_MODEL_ROOTS": str(models)}
    job_id = scene.plod(models / "tiny", file_id)
    worker.start(**{VARIABLE: point, **environment})
    if point.startswith("requeue"):
        wait_for(lambda: scene.row(job_id).state == "running", 40)
        worker.process.terminate()
    wait_for(lambda: worker.process.poll() is not None or "runner_killed" in scene.codes(job_id), 40)
    if worker.process.poll() is None:
        worker.kill()
    worker.start(**environment)
    job = until(job_id, "succeeded")
    assert scene.weights(job_id) == expected(scene, job)
    assert len(scene.artifacts()) == 1


def expected(scene: Scene, job: Job) -> bytes:
    """The weights, computed here."""
    rows = (scene.storage.root / str(job.prepared_ref) / "rows").read_bytes()
    state = b""
    for step in range(1, plodder.STEPS + 1):
        state = plodder.after(rows, state, step)
    return state


def test_a_worker_that_dies_between_the_rename_and_the_row(worker: Any, scene: Scene, until: Until) -> None:
    """Case 4. Twice, at either end of the gap: one artifact in the end, and the orphans are collected after an hour."""
    job_id = scene.submit()
    for number, point in enumerate(("publish.after_rename", "succeed.before_commit"), 1):
        dies(worker, point)
        assert (scene.row(job_id).state, scene.artifacts(), len(scene.folders())) == ("running", [], number)
    worker.start()
    job = until(job_id, "succeeded")
    assert (job.attempt, job.fence) == (3, 5)
    (artifact,) = scene.artifacts()
    assert (job.result or {})["artifact_ids"] == [artifact.id]
    assert artifact.version == 1
    orphans = scene.folders() - {artifact.id}
    assert len(orphans) == 2
    collector = Collector(scene.database, scene.storage)
    assert collector.collect(0.0) == []
    assert set(collector.collect(MIN_AGE)) == orphans
    assert scene.folders() == {artifact.id}
    assert scene.storage.verify(artifact.id) == []


def test_a_worker_that_dies_right_after_its_success(
    worker: Any, scene: Scene, until: Until, settings: Settings, valkey_url: str
) -> None:
    """Case 5. It stays a success; bells that ring again start nothing; the next worker makes the links for people."""
    job_id = scene.submit(experiment_name="nap")
    dies(worker, "succeed.after_commit")
    job = scene.row(job_id)
    assert (job.state, job.fence) == ("succeeded", 1)
    (artifact,) = scene.artifacts()
    doorbell = Doorbell(valkey_url)
    worker.start()
    for _ in range(10):
        doorbell.ring()
    until(scene.submit(experiment_name="another"), "succeeded")
    doorbell.close()
    again = scene.row(job_id)
    assert (again.fence, again.next_seq, again.finished_at) == (1, job.next_seq, job.finished_at)
    assert scene.codes(job_id) == ["job_queued", "job_started", "half_way", "job_complete"]
    assert scene.storage.verify(artifact.id) == []
    link = settings.data_dir / "models" / "merged_models" / "nap_v1"
    assert link.resolve() == scene.storage.artifact_dir(artifact.id).resolve()


@pytest.mark.parametrize(
    "point", [pytest.param("requeue.before_commit", marks=pytest.mark.long), "requeue.after_commit"]
)
def test_a_worker_that_dies_while_it_gives_a_job_back(
    point: str, worker: Any, scene: Scene, until: Until, tmp_path: Path
) -> None:
    """Case 6. The run was killed, its worker dies over it: the job waits or is taken over, and loses one attempt."""
    marker = tmp_path / "marker"
    job_id = scene.submit(mode="once", marker=str(marker), retry={"backoff_seconds": 0})
    worker.start(**{VARIABLE: point})
    os.kill(int(wait_for(lambda: marker.exists() and marker.read_text(), 40)), signal.SIGKILL)
    assert worker.process.wait(40) == -signal.SIGKILL, worker.log()
    job = scene.row(job_id)
    before = point.startswith("requeue.before")
    assert (job.state, job.attempt, job.fence) == ("running" if before else "queued", 1, 1)
    worker.start()
    job = until(job_id, "succeeded")
    assert (job.attempt, job.fence) == (2, 3 if before else 2)
    codes = scene.codes(job_id)
    assert (codes.count("worker_lost"), codes.count("runner_killed")) == ((1, 0) if before else (0, 1))
    assert len(scene.artifacts()) == 1


def test_worker_runner_and_broker_die_at_once(
    settings: Settings, scene: Scene, until: Until, after_the_fault: None, tmp_path: Path, timeline: Timeline
) -> None:
    """Case 8. And what the runner had left in a session of its own: one restart, and everything goes on."""
    from tests.faults.conftest import WorkerProcess  # noqa: PLC0415

    broker = Valkey(settings.data_dir, settings.run_dir).start()
    worker = WorkerProcess(settings, broker.url, tmp_path / "worker.log").start()
    marker = tmp_path / "marker"
    try:
        job_id = scene.submit(type="unruly", mode="daemon_once", marker=str(marker))
        waiting = scene.submit()
        stray = int(wait_for(lambda: marker.exists() and marker.read_text(), 40))
        token = f"{settings.instance}:{job_id}:1:light-0"
        wait_for(lambda: len(processes_with_token(token)) == 2)
        (runner,) = set(processes_with_token(token)) - {stray}
        assert broker.process is not None
        begun = time.monotonic()
        for pid in (broker.process.pid, runner, worker.pid):
            os.killpg(pid, signal.SIGKILL) if pid == worker.pid else os.kill(pid, signal.SIGKILL)
        broker.process.wait()
        worker.process.wait()  # type: ignore[union-attr]
        broker.start()
        worker.start()
        wait_for(lambda: not processes_with_token(token), 15)
        timeline.bound("P13", "everything killed → nothing of the attempt is left", time.monotonic() - begun, 15)
        wait_for(lambda: scene.row(job_id).fence == 3, 45)
        timeline.bound("P6", "everything killed → the job runs again", time.monotonic() - begun, 45)
        assert until(job_id, "succeeded").attempt == 2
        until(waiting, "succeeded")
        assert worker.stop() == 0
    finally:
        if worker.process is not None and worker.process.poll() is None:
            worker.kill()
        broker.stop()
