"""The parent of a runner: spawns one child for an attempt, listens, beats, ends it, and settles the row."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from app import states
from app.catalog import Catalog
from app.db import Database
from app.errors import Code, RunError
from app.jobs import repository
from app.models import Checkpoint, Job, new_id
from app.processes import LIFE_FD, TOKEN, exited, kill_ladder
from app.queue import AnyDoorbell
from app.settings import Settings
from app.storage import Storage, write_private
from workers.context import ATTEMPT, EVENTS, LOG, RESULT
from workers.inputs import attempt_file, resume_point
from workers.journal import Tail
from workers.ledger import Finished, Flags, Ledger, Line

PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "HF_HOME", "HF_ENDPOINT", "XDG_CACHE_HOME", "LD_LIBRARY_PATH")
_POLL = 0.1
_WRITE_EVERY = 1.0
_CANCEL_GRACE = 10.0
_LOG_CAP = 256 << 20


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


class Child:
    """A process of an attempt: its life pipe, its log, its journal."""

    def __init__(self, module: str, folder: Path, token: str, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.token = token
        self.tail = Tail(folder / EVENTS)
        read_end, self._life = os.pipe()
        # A file, not a pipe, takes the output: the end of this process neither blocks nor breaks the child.
        with (folder / LOG).open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-m", module, str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                env={**environment, TOKEN: token, LIFE_FD: str(read_end), "SPT_NOENV": "1"},
                pass_fds=[read_end],
                start_new_session=True,
            )
        os.close(read_end)

    def lines(self) -> list[Line]:
        """What the child told since the last call."""
        return list(self.tail.read())

    def tick(self) -> None:
        """Tells the child that its supervisor lives, and keeps its log bounded."""
        with contextlib.suppress(OSError):
            os.write(self._life, b".")
        with contextlib.suppress(OSError):
            log = self.folder / LOG
            if log.stat().st_size > _LOG_CAP:
                os.truncate(log, 0)

    def ask_to_stop(self) -> None:
        """SIGTERM to the first process: it saves itself and exits 75."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def end(self, grace: float) -> None:
        """Returns when no process of the attempt is left."""
        kill_ladder(self.process, self.token, grace)

    def close(self) -> None:
        """Gives the life pipe back; whatever still holds its other end reads EOF."""
        with contextlib.suppress(OSError):
            os.close(self._life)

    def log_tail(self, size: int = 4096) -> str:
        """The end of its log."""
        try:
            with (self.folder / LOG).open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - size))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""


def environment(settings: Settings, gpu: str | None) -> dict[str, str]:
    """A child's environment: a short list of ours, and what keeps libraries quiet."""
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    if gpu is not None:
        passed["CUDA_VISIBLE_DEVICES"] = gpu
    return {
        **passed,
        "PYTHONUNBUFFERED": "1",
        # Threads that spin while they wait starve each other as soon as the cores are shared with an engine.
        "GOMP_SPINCOUNT": "1000",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DO_NOT_TRACK": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }


def token_of(settings: Settings, job: Job, slot_id: str) -> str:
    """Names an attempt so that no other installation's processes are ever hit."""
    return f"{settings.instance}:{job.id}:{job.fence}:{slot_id}"


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
            child = self.spawn("workers.runner", attempt)
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
            if self.house.stopping.is_set() or flags.pause:
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
            self._conclude(child, status, paused=flags.pause)
            # A cancellation that came after the last beat: every other way out of RUNNING refuses it.
            self.ledger.cancelled()

    def _conclude(self, child: Child, status: int, *, paused: bool) -> None:
        result = _result(self.folder)
        if result is not None and result.get("status") == "ok":
            try:
                with self.beating():  # hashing a large model takes longer than a lease
                    self._publish(result)
            except RunError as error:
                self.ledger.fail(error, status)
            except OSError as error:
                self.ledger.fail(RunError(Code.STORAGE_ERROR, f"the result cannot be stored: {error}"), status)
        elif result is not None:
            self.ledger.fail(_error_of(result), status, result.get("result"))
        elif paused:
            self.ledger.requeue("job_paused", "On hold; resume puts it back.", give_back=True, exit_code=status)
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
