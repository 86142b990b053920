"""What of a job's checkpoints stays on disk: enough to go on, bounded however often it was interrupted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.catalog import Catalog
from app.crashpoints import VARIABLE
from app.db import Database
from app.jobs import claims, repository
from app.models import DEFAULT_PROJECT, Checkpoint, Job, Slot, Worker
from app.projects.repository import ensure_default
from app.queue import SilentDoorbell
from app.storage import COMPLETE, Storage
from tests.support import on_sqlite
from workers.checkpoints import best_of, committed, rotate
from workers.context import ATTEMPT, EVENTS, JobContext
from workers.inputs import resume_point
from workers.ledger import Ledger
from workers.loading.cadence import Cadence

STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
WEIGHTS = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}


def write(job_dir: Path, fence: int, step: int) -> Path:
    """A checkpoint folder that nobody has committed."""
    folder = job_dir / f"a{fence}" / "ckpt" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in STATE | WEIGHTS:
        (folder / name).write_text(f"{name} of {fence}/{step}")
    return folder


def commit(job_dir: Path, fence: int, step: int, loss: float | None = None, keep: int | None = None) -> Path:
    folder = write(job_dir, fence, step)
    Storage.commit_checkpoint(folder, step, {"eval_loss": loss} if loss is not None else {}, loss)
    rotate(job_dir, fence, keep)
    return folder


def there(job_dir: Path) -> dict[str, bool]:
    """Every checkpoint folder: whether its trainer state is there. Its weights must be."""
    found = {}
    for folder in job_dir.glob("a*/ckpt/*"):
        names = {path.name for path in folder.iterdir()} - {COMPLETE}
        assert names in (WEIGHTS, WEIGHTS | STATE)
        found[f"{folder.parent.parent.name}/{folder.name.partition('-')[2]}"] = names > WEIGHTS
    return found


def test_weights_stay_and_the_state_of_all_but_the_newest_two_goes(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        commit(tmp_path, 1, step)
    assert there(tmp_path) == {"a1/10": False, "a1/20": False, "a1/30": True, "a1/40": True}
    assert [(item.step, item.resumable) for item in committed(tmp_path, 1)] == [
        (40, True),
        (30, True),
        (20, False),
        (10, False),
    ]
    thinned = tmp_path / "a1" / "ckpt" / "checkpoint-10"
    assert Storage.checkpoint_faults(thinned) == []
    assert set(Storage.checkpoint_record(thinned)["files"]) == WEIGHTS
    (thinned / "adapter_model.safetensors").write_text("something else of this length"[:33])
    assert Storage.checkpoint_faults(thinned) == ["adapter_model.safetensors"]


def test_nothing_goes_before_a_newer_one_is_committed(tmp_path: Path) -> None:
    for step in (10, 20):
        commit(tmp_path, 1, step)
    write(tmp_path, 1, 30)
    rotate(tmp_path, 1, None)
    assert there(tmp_path) == {"a1/10": True, "a1/20": True, "a1/30": True}
    # Another attempt that has committed nothing yet touches nothing.
    write(tmp_path, 3, 30)
    rotate(tmp_path, 3, None)
    assert there(tmp_path) == {"a1/10": True, "a1/20": True, "a1/30": True, "a3/30": True}


def test_of_a_full_fine_tune_the_newest_two_and_the_best_stay(tmp_path: Path) -> None:
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 1.0), (50, None), (60, 4.0)):
        commit(tmp_path, 1, step, loss, keep=2)
    assert there(tmp_path) == {"a1/20": False, "a1/50": True, "a1/60": True}
    assert best_of([(10, None), (20, None)]) is None
    commit(tmp_path, 1, 70, 0.5, keep=1)
    assert there(tmp_path) == {"a1/60": True, "a1/70": True}


def test_a_larger_limit_keeps_more_weights_not_more_state(tmp_path: Path) -> None:
    for step in range(10, 70, 10):
        commit(tmp_path, 1, step, keep=4)
    assert there(tmp_path) == {"a1/30": False, "a1/40": False, "a1/50": True, "a1/60": True}


@pytest.mark.parametrize("keep", [None, 2])
def test_five_interrupted_attempts_leave_no_more_than_one_that_ran_through(tmp_path: Path, keep: int | None) -> None:
    """Each is killed while it writes its fourth checkpoint; the next goes on from its third."""
    step = 0
    for fence in (1, 3, 5, 7, 9):
        for _ in range(3):
            step += 10
            commit(tmp_path, fence, step, keep=keep)
        write(tmp_path, fence, step + 10)
    found = there(tmp_path)
    unfinished = found.pop("a9/160")
    assert unfinished
    assert sorted(name for name, resumable in found.items() if resumable) == ["a9/140", "a9/150"]
    steps = sorted(int(name.partition("/")[2]) for name in found)
    assert steps == (list(range(10, 160, 10)) if keep is None else [140, 150])


def test_what_a_later_attempt_did_again_or_passed_by_is_gone(tmp_path: Path) -> None:
    """Attempt 1 left 10 … 40; 30 and 40 were damaged, so attempt 3 goes on from 20."""
    for step in (10, 20, 30, 40):
        commit(tmp_path, 1, step)
    commit(tmp_path, 3, 25)
    assert there(tmp_path) == {"a1/10": False, "a1/20": False, "a3/25": True}
    commit(tmp_path, 3, 30)
    assert there(tmp_path) == {"a1/10": False, "a1/20": False, "a3/25": True, "a3/30": True}


def test_of_earlier_attempts_the_prepared_inputs_stay_and_scratch_space_goes(tmp_path: Path) -> None:
    commit(tmp_path, 1, 10)
    for fence in (1, 3):
        for name in ("prepared", "work", "out0.tmp"):
            (tmp_path / f"a{fence}" / name).mkdir(parents=True)
            (tmp_path / f"a{fence}" / name / "large").write_text("x")
    rotate(tmp_path, 3, None)  # it has committed nothing yet
    assert (tmp_path / "a1" / "work").exists()
    commit(tmp_path, 3, 20)
    assert {path.name for path in (tmp_path / "a1").iterdir()} == {"ckpt", "prepared"}
    assert {path.name for path in (tmp_path / "a3").iterdir()} == {"ckpt", "prepared", "work", "out0.tmp"}


def test_a_stale_attempt_touches_nothing_of_its_successor(tmp_path: Path) -> None:
    commit(tmp_path, 1, 10)
    for step in (20, 30):
        commit(tmp_path, 3, step)
    write(tmp_path, 3, 40)
    for step in (20, 30, 40):
        commit(tmp_path, 1, step, keep=2)
    assert {name for name in there(tmp_path) if name.startswith("a3")} == {"a3/20", "a3/30", "a3/40"}


def test_killed_while_it_thins(tmp_path: Path) -> None:
    """The checkpoint says first that it cannot be resumed; its weights verify; the next rotation finishes the work."""
    for step in (10, 20):
        commit(tmp_path, 1, step)
    Storage.commit_checkpoint(write(tmp_path, 1, 30), 30)
    code = f"from pathlib import Path; from workers.checkpoints import rotate; rotate(Path({str(tmp_path)!r}), 1, None)"
    killed = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, VARIABLE: "checkpoint.thinned"}, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL
    thinned = tmp_path / "a1" / "ckpt" / "checkpoint-10"
    assert Storage.checkpoint_faults(thinned) == []
    assert not Storage.checkpoint_record(thinned)["resumable"]
    assert (thinned / "optimizer.pt").exists()
    rotate(tmp_path, 1, None)
    assert there(tmp_path) == {"a1/10": False, "a1/20": True, "a1/30": True}


def test_a_thinned_checkpoint_is_never_resumed_and_never_called_damaged(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    job_dir = storage.job_dir("j")
    folders = [commit(job_dir, 1, step) for step in (10, 20, 30)]
    rows = [
        Checkpoint(step=step, path=str(folder.relative_to(tmp_path)))
        for step, folder in zip((10, 20, 30), folders, strict=True)
    ][::-1]
    assert resume_point(storage, rows) == (folders[2], [])
    for folder in folders[1:]:
        (folder / "optimizer.pt").write_text("x")
    assert resume_point(storage, rows) == (None, [(30, "optimizer.pt"), (20, "optimizer.pt")])


@on_sqlite
def test_rows_are_in_step_with_the_disk(database: Database, storage: Storage, tmp_path: Path) -> None:
    with database.write() as session:
        ensure_default(session)
        session.add(Worker(id="w1", host="h", pid=1))
        session.flush()
        session.add(Slot(worker_id="w1", slot_id="light-0", slot_class="light"))
        fields: dict[str, Any] = {"spec": {}, "spec_sha256": "", "resolved_spec": {}, "slot_class": "light"}
        job = Job(id="job-1", type="train", experiment_name="e", project_id=DEFAULT_PROJECT, **fields)
        repository.add(session, job)
    with database.write() as session:
        claimed = claims.claim(session, "w1", "light-0", ["light"])
    assert claimed is not None
    ledger = Ledger(database, storage, SilentDoorbell(), claimed, "w1")
    attempt = {"job_id": "job-1", "inputs": {}}
    folder = storage.attempt_dir("job-1", claimed.fence)
    folder.mkdir(parents=True)
    (folder / ATTEMPT).write_text(json.dumps(attempt))
    ctx = JobContext(folder, attempt, Catalog())
    size = sum(path.stat().st_size for path in write(tmp_path / "elsewhere", 1, 10).iterdir())

    def rows() -> list[tuple[int, bool, bool]]:
        seen = 0
        for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 1.5)):
            ctx.checkpoint(write(folder.parent, claimed.fence, step), step, {"eval_loss": loss}, keep=2)
            ctx.settle()
            lines = [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]
            ledger.beat(lines[seen:])
            seen = len(lines)
        with database.read() as session:
            return [(row.step, row.best, row.bytes == size) for row in repository.checkpoints(session, "job-1")]

    assert rows() == [(40, False, True), (30, False, True), (20, True, False)]
    assert sorted(path.name for path in (folder / "ckpt").iterdir()) == [f"checkpoint-{n}" for n in (20, 30, 40)]


def test_the_clock_asks_for_a_checkpoint_and_writing_stays_below_two_per_cent() -> None:
    now = [100.0]
    cadence = Cadence(20, lambda: now[0])
    now[0] = 500
    cadence.start()  # loading took long
    assert not cadence.due()
    now[0] += 19.9
    assert not cadence.due()
    now[0] += 0.1
    assert cadence.due()

    def save(seconds: float) -> None:
        cadence.begin()
        now[0] += seconds
        cadence.end()

    save(0.3)
    assert cadence.interval == 20
    save(2)
    assert cadence.interval == pytest.approx(98)
    assert 2 / (2 + cadence.interval) == pytest.approx(0.02)
    now[0] += 97
    assert not cadence.due()
    now[0] += 1.1
    assert cadence.due()
    save(0.1)  # a fast disk again
    assert cadence.interval == 20
