"""The parent of a runner: spawns one child for an attempt, listens, beats, ends it, and settles the row."""

import contextlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from app import states
from app.catalog import Catalog
from app.crashpoints import reached
from app.db import Database
from app.errors import Code, RunError
from app.jobs import repository
from app.jobs.placement import ON_A_GPU
from app.models import Checkpoint, Job, new_id
from app.processes import exited
from app.queue import AnyDoorbell
from app.settings import Settings
from app.storage import Storage, write_private
from workers.child import Child, environment, token_of
from workers.context import ATTEMPT, PREPARED, RESULT
from workers.inputs import attempt_file, resume_point
from workers.ledger import Finished, Flags, Ledger, Line

_POLL = 0.1
_WRITE_EVERY = 1.0
_CANCEL_GRACE = 10.0


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
            reached("spawn.before")
            several = self.job.gpus > 1 and self.job.slot_class in ON_A_GPU
            child = self.spawn("workers.ranks" if several else "workers.runner", attempt)
            reached("spawn.after")
        except RunError as error:
            self.ledger.fail(error)
            return
        try:
            self._settle(child, self.listen(child))
        except BaseException:
            child.end(0)  # whatever went wrong here, nothing computes on unwatched
            raise
        finally:
            child.close()

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
        last_beat = last_answer = time.monotonic()
        while True:
            gone = exited(child.process)
            new = child.lines()
            while gone and (rest := child.lines()):
                new += rest
            pending += new
            if new and on_lines is not None:
                on_lines(new)
            now = time.monotonic()
            due = now - last_beat >= (_WRITE_EVERY if pending else settings.heartbeat_seconds)
            if gone or due:
                child.tick()
                try:
                    flags = self.ledger.beat(pending)
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
            if self.house.stopping.is_set() or flags.pause or flags.preempt_for:
                if asked_at is None:
                    asked_at = now
                    child.ask_to_stop()
                elif now - asked_at > grace:
                    child.end(0)
            else:
                asked_at = None  # the pause was taken back
            time.sleep(_POLL)

    def _settle(self, child: Child, flags: Flags) -> None:
        status = child.process.wait()
        if flags.lost:
            return
        if flags.cancel:
            self.ledger.cancelled()
        else:
            self._conclude(child, status, flags)
            # A cancellation that came after the last beat: every other way out of RUNNING refuses it.
            self.ledger.cancelled()

    def _conclude(self, child: Child, status: int, flags: Flags) -> None:
        result = _result(self.folder)
        if result is not None and result.get("status") == "ok":
            try:
                with self.beating():  # hashing a large model takes longer than a lease
                    self._commit_prepared() if self.job.next_class is not None else self._publish(result)
            except RunError as error:
                self.ledger.fail(error, status)
            except OSError as error:
                self.ledger.fail(RunError(Code.STORAGE_ERROR, f"the result cannot be stored: {error}"), status)
        elif result is not None:
            self.ledger.fail(_error_of(result), status, result.get("result"))
        elif flags.pause:
            self.ledger.requeue("job_paused", "On hold; resume puts it back.", give_back=True, exit_code=status)
        elif flags.preempt_for:
            message = f"Made room for {flags.preempt_for}; the job goes on when there is a slot again."
            self.ledger.requeue("job_preempted", message, give_back=True, exit_code=status)
        elif status == states.EXIT_CHECKPOINTED or self.house.stopping.is_set():
            self.ledger.requeue(
                "job_interrupted", "The worker is stopping; the job runs again.", give_back=True, exit_code=status
            )
        elif status == states.EXIT_DONE:
            self.ledger.fail(RunError(Code.PROTOCOL, "the run ended without a result"), status)
        else:
            self.ledger.crashed(status, _how_it_ended(status), child.log_tail())

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """The job stays ours while this thread works for it."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(self.house.settings.heartbeat_seconds):
                with contextlib.suppress(SQLAlchemyError):
                    self.ledger.beat([])

        thread = threading.Thread(target=beat, name=f"{self.slot_id}-beat")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _commit_prepared(self) -> None:
        """Makes the prepared inputs durable, then lets the job wait for its own slot."""
        folder = self.folder / PREPARED
        self.house.storage.commit_checkpoint(folder, 0)
        self.ledger.prepared(str(folder.relative_to(self.house.storage.root)))

    def _publish(self, result: dict[str, Any]) -> None:
        finished: list[Finished] = []
        for output in result.get("outputs", []):
            facts = {**_lineage(self.job, self.folder), **output["facts"]}
            artifact_id = new_id("art")
            about = {"job_id": self.job.id, "fence": self.job.fence, "spec_sha256": self.job.spec_sha256, **facts}
            published = self.house.storage.publish(self.folder / output["folder"], artifact_id, about)
            name = output["name"] or self.job.experiment_name
            finished.append(Finished(artifact_id, output["kind"], name, facts, published))
        if not self.ledger.succeed(result.get("result", {}), finished):
            for item in finished:  # cancelled or taken over meanwhile: what no row points to goes
                shutil.rmtree(self.house.storage.artifact_dir(item.artifact_id), ignore_errors=True)


def _lineage(job: Job, folder: Path) -> dict[str, Any]:
    """Where a result comes from: the pinned base and everything it was itself made from."""
    inputs = json.loads((folder / ATTEMPT).read_bytes())["inputs"]
    if job.type == "train":
        base = inputs["model.model_name_or_path"]
        chain = list(base.get("base_chain") or [base["pinned"]])
        return {
            "base": base["pinned"],
            "base_artifact_id": base.get("artifact_id"),
            "base_chain": [*chain, f"{job.algorithm}:{job.id}"],
        }
    for field in ("adapter", "model"):
        if field in inputs:
            return {"base_chain": list(inputs[field].get("base_chain") or [])}
    return {}


def _result(folder: Path) -> dict[str, Any] | None:
    try:
        value = json.loads((folder / RESULT).read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _error_of(result: dict[str, Any]) -> RunError:
    error = result.get("error") or {}
    try:
        code = Code(str(error.get("code")))
    except ValueError:
        code = Code.RUN_FAILED
    return RunError(code, str(error.get("message", "the run failed")), hint=error.get("hint"), param=error.get("param"))


def _how_it_ended(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"The run was ended by {signal.Signals(-status).name}."
    return f"The run exited with status {status}."
