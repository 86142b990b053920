"""The parent of a runner: spawns one child for an attempt, listens, beats, ends it, and settles the row."""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from app import disk
from app.catalog import Catalog
from app.crashpoints import reached
from app.db import Database
from app.errors import Code, RunError
from app.jobs import repository, room
from app.jobs.continuing import FIELD, checkpoint_of
from app.jobs.placement import ON_A_GPU
from app.models import Checkpoint, Job
from app.processes import exited, oom_kill_count
from app.queue import AnyDoorbell
from app.settings import Settings
from app.storage import KEPT, Storage, write_private
from workers.checkpoints import clear_scratch, unheard
from workers.child import OFFLINE, Child, environment, goes_offline, secrets_for, token_of
from workers.context import ATTEMPT, PREPARED
from workers.inputs import attempt_file, attempt_spec, resume_point
from workers.ledger import Flags, Ledger, Line
from workers.lookout import Lookout
from workers.outcome import Outcome, Why
from workers.parking import Parking
from workers.tracking import Tracking
from workers.warm import Spares

_POLL = 0.1
_WRITE_EVERY = 1.0
_CANCEL_GRACE = 10.0
_ROOM = 3600.0  # the reconciler looks for room sooner
RUNNER = "workers.runner"
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
    spares: Spares | None = None
    parking: Parking | None = None
    """Where engines sleep; None: there they end."""
    listeners: set[threading.Event] = field(default_factory=set)
    """Set by every ring of the doorbell: something may have changed in the database."""


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
        self._tracking: Tracking | None = None
        self._lookout: Lookout | None = None
        stall = (job.resolved_spec.get("limits") or {}).get("stall_seconds")
        self._stall_seconds: float | None = stall or (STALL_SECONDS if job.type == "train" else None)
        self._begun = time.monotonic()

    def run(self) -> None:
        """Trains, merges, validates: whatever the job is."""
        try:
            with self.house.database.read() as session:
                attempt = attempt_file(session, self.house.settings, self.house.catalog, self.job)
            resume = self._resume_from(self._checkpoints())
            own = resume is None or resume.is_relative_to(self.folder.parent)
            attempt |= {"resume_from": None if resume is None else str(resume), "continues": not own}
            clear_scratch(self.folder.parent, self.job.fence - 1)
            if self.job.next_class is not None:
                attempt["prepared_dir"] = str(self.folder / PREPARED)
            elif self.job.prepared_ref is not None:
                fault = self._prepared_fault(self.job.prepared_ref)
                if fault is not None:
                    self.ledger.prepare_again(fault)
                    return
                attempt["prepared_dir"] = str(self.house.storage.root / self.job.prepared_ref)
            attempt["offline"] = goes_offline(self.house.catalog, self.job, attempt["inputs"])
            spec = attempt_spec(self.house.catalog, self.job)
            lack = room.shortage(self.house.settings, spec, attempt["inputs"], self.folder.parent / KEPT)
            if lack is not None:
                needed = {"needed_bytes": lack.needed, "free_bytes": lack.free}
                self.ledger.hold(room.DISK_FULL, lack.message, delay=_ROOM, **needed)
                return
            oom_kills = oom_kill_count()
            reached("spawn.before")
            several = self.job.gpus > 1 and self.job.slot_class in ON_A_GPU
            secrets = secrets_for(self.house.catalog, self.job, attempt["inputs"])
            child = self.spawn("workers.ranks" if several else RUNNER, attempt, secrets)
            reached("spawn.after")
        except RunError as error:
            if error.code is Code.DISK_FULL:
                self.ledger.hold(room.DISK_FULL, "The disk is full; the job starts when there is room.", delay=_ROOM)
            else:
                self.ledger.fail(error)
            return
        quiet = environment(self.house.settings, None)
        self._tracking = Tracking.start(self.house.catalog, self.job, self.folder, child.token, quiet)
        try:
            if spec.asks_served and self.job.resolved_spec["deployment"]:
                self._lookout = self._look_out(attempt["inputs"])
            hear = self._lookout.hear if self._lookout is not None else None
            self._settle(child, self.listen(child, hear), oom_kills)
        except BaseException:
            child.end(0)  # whatever went wrong here, nothing computes on unwatched
            raise
        finally:
            child.close()
            if self._tracking is not None:
                self._tracking.stop()
            if self._lookout is not None:
                self._lookout.stop()
            clear_scratch(self.folder.parent, self.job.fence)

    def _look_out(self, inputs: Mapping[str, Mapping[str, Any]]) -> Lookout:
        """Somebody who tells the run where the model is served that it asks."""
        house = self.house
        lookout = Lookout(house.database, house.settings, house.doorbell.ring, self.job, self.folder, inputs)
        lookout.start()
        return lookout

    def _prepared_fault(self, reference: str) -> str | None:
        """The first file of the inputs made ready that is not as it was committed. Reads them whole."""
        with self.beating():
            faults = self.house.storage.checkpoint_faults(self.house.storage.root / reference)
        return faults[0] if faults else None

    def _checkpoints(self) -> Sequence[Checkpoint]:
        """The job's, newest first, with those that the worker before did not live to hear of."""
        for _ in range(2):
            with self.house.database.read() as session:
                found = repository.checkpoints(session, self.job.id)
            known = {self.house.storage.root / checkpoint.path for checkpoint in found}
            lines = unheard(self.folder.parent, self.job.fence - 1, known)
            if not lines:
                break
            self.ledger.beat(lines)
        return found

    def _origin(self) -> Checkpoint | None:
        """The checkpoint of another job that this one goes on from."""
        wanted = self.job.resolved_spec.get(FIELD)
        if not wanted:
            return None
        with self.house.database.read() as session:
            found = checkpoint_of(session, self.job.project_id, wanted)
        if found is None:
            raise RunError(Code.MODEL_NOT_FOUND, f"the checkpoint {wanted} is gone", param=FIELD)
        return found[0]

    def _resume_from(self, checkpoints: Sequence[Checkpoint]) -> Path | None:
        """Where the run goes on, said in its history. Raises RunError when another job's checkpoint is damaged."""
        origin = self._origin()
        if not checkpoints and origin is None:
            return None
        with self.beating():
            folder, rejected = resume_point(self.house.storage, checkpoints)
            if folder is None and origin is not None:
                folder, damaged = resume_point(self.house.storage, [origin])
                if damaged:
                    message = f"the checkpoint at step {origin.step} of {origin.job_id} is damaged ({damaged[0][1]})"
                    raise RunError(Code.MODEL_INVALID, message, param=FIELD, hint="Go on from an older one.")
        with self.house.database.write() as session:
            for step, name in rejected:
                message = f"The checkpoint at step {step} is damaged ({name}); an older one is taken."
                self.ledger.note(session, "checkpoint_rejected", message, "warn", {"step": step, "file": name})
            if folder is not None:
                self.ledger.note(
                    session, "job_restarted", f"Goes on from {folder.name}.", "info", {"from": folder.name}
                )
        return folder

    def spawn(self, module: str, attempt: Mapping[str, Any], secrets: Mapping[str, str] | None = None) -> Child:
        """Writes ``attempt.json`` and starts the child. Raises RunError when the disk refuses."""
        token = token_of(self.house.settings, self.job, self.slot_id)
        offline = bool(attempt.get("offline"))
        # A spare has threads already, which would keep the network, and its libraries have read their settings.
        spares = self.house.spares if module == RUNNER and not offline else None
        try:
            self.folder.mkdir(mode=0o700, parents=True)
            write_private(self.folder / ATTEMPT, json.dumps(attempt).encode())
            spare = spares.take() if spares is not None else None
            wanted = environment(self.house.settings, self.gpu) | (OFFLINE if offline else {})
            return Child(module, self.folder, token, wanted, spare, secrets)
        except OSError as error:
            code = Code.DISK_FULL if disk.is_full(error) else Code.STORAGE_ERROR
            raise RunError(code, f"the attempt cannot be started: {error}") from error

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
            if gone:
                child.end(0)  # now nobody writes any more
            new = child.lines()
            unheard = gone and child.tail.unread()
            child.trim_log()
            pending += [line for line in new if line["kind"] != "tick"]
            pending += self._tracking.lines() if self._tracking is not None else []
            if new and on_lines is not None:
                on_lines(new)
            now = time.monotonic()
            last_word = now if new else last_word
            due = now - last_beat >= (_WRITE_EVERY if pending else settings.heartbeat_seconds)
            if due or (gone and (pending or not unheard)):
                try:
                    flags = self.ledger.beat(pending, self._run_seconds())
                    pending, last_answer = [], now
                except SQLAlchemyError:
                    # While nobody can write, nobody can reap either: the run goes on, up to ten leases.
                    if time.monotonic() - last_answer > 10 * settings.lease_seconds:
                        flags = Flags(lost=True)
                last_beat = now
            if flags.lost:
                child.end(0)
                return flags
            if gone:
                if unheard:
                    continue
                return flags
            if flags.cancel:
                child.end(_CANCEL_GRACE if stop_grace is None else stop_grace)
                return flags
            if self.leaves() and not pending:
                return flags
            if self._stall_seconds is not None and now - last_word >= self._stall_seconds:
                self._why = "stalled"
                child.end(_CANCEL_GRACE)
            if self.job.wall_seconds is not None and self._run_seconds() >= self.job.wall_seconds:
                self._why = "wall_time"
            if self.house.stopping.is_set() or flags.pause or self.makes_room(flags) or self._why == "wall_time":
                if asked_at is None:
                    asked_at = now
                    child.ask_to_stop()
                elif now - asked_at > grace:
                    child.end(0)
            else:
                asked_at = None  # the pause was taken back
            time.sleep(_POLL)

    def leaves(self) -> bool:
        """Whether the child lives on without this supervision."""
        return False

    def makes_room(self, flags: Flags) -> bool:
        """Whether the child is to stop, because another job was promised its slot."""
        return flags.preempt_for is not None

    def _run_seconds(self) -> float:
        """Time in slots over all attempts, by this worker's own clock."""
        return self.job.run_seconds + time.monotonic() - self._begun

    def _settle(self, child: Child, flags: Flags, oom_kills: int) -> None:
        status = child.process.wait()
        if flags.lost:
            return
        if flags.cancel:
            self.ledger.cancelled()
            shutil.rmtree(self.folder.parent / KEPT, ignore_errors=True)
        else:
            reserve = room.reserve_bytes(self.house.settings)
            outcome = Outcome(self.job, self.folder, self.house.storage, self.ledger, self.beating, reserve)
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
