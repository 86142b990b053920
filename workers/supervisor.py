"""The parent of a runner: spawns one child for an attempt, listens, beats, ends it, and settles the row."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from app.catalog import Catalog
from app.crashpoints import reached
from app.db import Database
from app.errors import Code, RunError
from app.jobs import repository, room
from app.jobs.placement import ON_A_GPU
from app.jobs.room import Shortage, shortage
from app.models import Checkpoint, Job
from app.processes import exited, oom_kill_count
from app.queue import AnyDoorbell
from app.settings import Settings
from app.storage import Storage, write_private
from workers.child import Child, environment, token_of
from workers.context import ATTEMPT, PREPARED
from workers.inputs import attempt_file, attempt_spec, resume_point
from workers.ledger import Flags, Ledger, Line
from workers.outcome import Outcome, Why

_POLL = 0.1
_WRITE_EVERY = 1.0
_CANCEL_GRACE = 10.0
DISK_SECONDS = 30.0
"""Pause of a job that found no room on the disk; the reconciler ends it sooner when there is."""
_ROOM = 3600.0  # the reconciler looks for room sooner
STALL_SECONDS = 1800.0
"""Silence after which a training run counts as stuck, unless its limits say otherwise."""


@dataclass(frozen=True)
class House:
    """What a worker holds for its slots."""

    settings: Settings
    database: Database
    storage: Storage
    catalog: Catalog
    doorbell: AnyDoorbell
    worker_id: str
    stopping: threading.Event


class Supervision:
    """One attempt from spawn to the settled row. ``on_status`` hears of an engine's state (replicas only)."""

    def __init__(self, house: House, job: Job, slot_id: str, gpu: str | None = None) -> None:
        self.house = house
        self.job = job
        self.slot_id = slot_id
        self.gpu = gpu
        self.ledger = Ledger(house.database, house.storage, house.doorbell, job, house.worker_id)
        self.folder = house.storage.attempt_dir(job.id, job.fence)
        self._why: Why | None = None
        stall = (job.resolved_spec.get("limits") or {}).get("stall_seconds")
        self._stall_seconds: float | None = stall or (STALL_SECONDS if job.type == "train" else None)
        self._begun = time.monotonic()

    def run(self) -> None:
        """Trains, merges, validates: whatever the job is."""
        try:
            with self.house.database.read() as session:
                attempt = attempt_file(session, self.house.settings, self.house.catalog, self.job)
                checkpoints = repository.checkpoints(session, self.job.id)
            attempt["resume_from"] = self._resume_from(checkpoints)
            if self.job.next_class is not None:
                attempt["prepared_dir"] = str(self.folder / PREPARED)
            elif self.job.prepared_ref is not None:
                fault = self._prepared_fault(self.job.prepared_ref)
                if fault is not None:
                    self.ledger.prepare_again(fault)
                    return
                attempt["prepared_dir"] = str(self.house.storage.root / self.job.prepared_ref)
            spec = attempt_spec(self.house.catalog, self.job)
            missing = room.shortage(self.house.settings, spec, attempt["inputs"])
            if missing is not None:
                self.ledger.hold(room.DISK_FULL, missing.message, delay=DISK_SECONDS, needed_bytes=missing.needed)
                return
            oom_kills = oom_kill_count()
            lack = self._shortage(attempt)
            if lack is not None:
                self.ledger.hold("disk_full", lack.message, delay=_ROOM, needed_bytes=lack.needed, free_bytes=lack.free)
                return
            reached("spawn.before")
            several = self.job.gpus > 1 and self.job.slot_class in ON_A_GPU
            child = self.spawn("workers.ranks" if several else "workers.runner", attempt)
            reached("spawn.after")
        except RunError as error:
            self.ledger.fail(error)
            return
        try:
            self._settle(child, self.listen(child), oom_kills)
        except BaseException:
            child.end(0)  # whatever went wrong here, nothing computes on unwatched
            raise
        finally:
            child.close()

    def _shortage(self, attempt: Mapping[str, Any]) -> Shortage | None:
        spec_class = self.house.catalog.spec_class(self.job.type, self.job.algorithm)
        if spec_class is None:
            return None
        return shortage(self.house.settings, spec_class.model_validate(attempt["spec"]), attempt["inputs"])

    def _prepared_fault(self, reference: str) -> str | None:
        """The first file of the inputs made ready that is not as it was committed. Reads them whole."""
        with self.beating():
            faults = self.house.storage.checkpoint_faults(self.house.storage.root / reference)
        return faults[0] if faults else None

    def _resume_from(self, checkpoints: Sequence[Checkpoint]) -> str | None:
        """Where the run goes on, said in its history."""
        if not checkpoints:
            return None
        with self.beating():
            folder, rejected = resume_point(self.house.storage, checkpoints)
        with self.house.database.write() as session:
            for step, name in rejected:
                message = f"The checkpoint at step {step} is damaged ({name}); an older one is taken."
                self.ledger.note(session, "checkpoint_rejected", message, "warn", {"step": step, "file": name})
            if folder is not None:
                self.ledger.note(
                    session, "job_restarted", f"Goes on from {folder.name}.", "info", {"from": folder.name}
                )
        return str(folder) if folder is not None else None

    def spawn(self, module: str, attempt: Mapping[str, Any]) -> Child:
        """Writes ``attempt.json`` and starts the child. Raises RunError when the disk refuses."""
        try:
            self.folder.mkdir(mode=0o700, parents=True)
            write_private(self.folder / ATTEMPT, json.dumps(attempt).encode())
        except OSError as error:
            raise RunError(Code.STORAGE_ERROR, f"the attempt's folder cannot be made: {error}") from error
        token = token_of(self.house.settings, self.job, self.slot_id)
        return Child(module, self.folder, token, environment(self.house.settings, self.gpu))

    def listen(
        self, child: Child, on_lines: Callable[[list[Line]], None] | None = None, stop_grace: float | None = None
    ) -> Flags:
        """Beats until the child is gone; returns why it was ended, if it was."""
        settings = self.house.settings
        # Only training can save itself; what else runs starts anew anyway.
        patience = settings.grace_seconds if self.job.type == "train" else min(_CANCEL_GRACE, settings.grace_seconds)
        grace = patience if stop_grace is None else stop_grace
        pending: list[Line] = []
        flags, asked_at = Flags(), None
        last_beat = last_answer = last_word = self._begun = time.monotonic()
        while True:
            gone = exited(child.process)
            new = child.lines()
            while gone and (rest := child.lines()):
                new += rest
            pending += [line for line in new if line["kind"] != "tick"]
            if new and on_lines is not None:
                on_lines(new)
            now = time.monotonic()
            last_word = now if new else last_word
            due = now - last_beat >= (_WRITE_EVERY if pending else settings.heartbeat_seconds)
            if gone or due:
                child.trim_log()
                try:
                    flags = self.ledger.beat(pending, self._run_seconds())
                    pending, last_answer = [], now
                except SQLAlchemyError:
                    # While nobody can write, nobody can reap either: the run goes on, up to ten leases.
                    if now - last_answer > 10 * settings.lease_seconds:
                        flags = Flags(lost=True)
                last_beat = now
            if gone:
                child.end(0)
                return flags
            if flags.lost:
                child.end(0)
                return flags
            if flags.cancel:
                child.end(_CANCEL_GRACE if stop_grace is None else stop_grace)
                return flags
            if self._stall_seconds is not None and now - last_word >= self._stall_seconds:
                self._why = "stalled"
                child.end(_CANCEL_GRACE)
            if self.job.wall_seconds is not None and self._run_seconds() >= self.job.wall_seconds:
                self._why = "wall_time"
            if self.house.stopping.is_set() or flags.pause or flags.preempt_for or self._why == "wall_time":
                if asked_at is None:
                    asked_at = now
                    child.ask_to_stop()
                elif now - asked_at > grace:
                    child.end(0)
            else:
                asked_at = None  # the pause was taken back
            time.sleep(_POLL)

    def _run_seconds(self) -> float:
        """Time in slots over all attempts, by this worker's own clock."""
        return self.job.run_seconds + time.monotonic() - self._begun

    def _settle(self, child: Child, flags: Flags, oom_kills: int) -> None:
        status = child.process.wait()
        if flags.lost:
            return
        if flags.cancel:
            self.ledger.cancelled()
        else:
            outcome = Outcome(self.job, self.folder, self.house.storage, self.ledger, self.beating)
            outcome.settle(
                status,
                flags,
                stopping=self.house.stopping.is_set(),
                why=self._why,
                starved=oom_kill_count() > oom_kills,
                log_tail=child.log_tail(),
            )
            # A cancellation that came after the last beat: every other way out of RUNNING refuses it.
            self.ledger.cancelled()

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """The job stays ours while this thread works for it."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(self.house.settings.heartbeat_seconds):
                with contextlib.suppress(SQLAlchemyError):
                    self.ledger.beat([], self._run_seconds())

        thread = threading.Thread(target=beat, name=f"{self.slot_id}-beat")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
