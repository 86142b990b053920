"""The database side of one attempt: heartbeats with what the child told, and the one way out of RUNNING.

Every write carries the attempt's fence; when it no longer matches, nothing is written and the caller learns it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

from app.aliases import repository as aliases
from app.artifacts import repository as artifacts
from app.artifacts import view
from app.crashpoints import reached
from app.db import Database, after_commit
from app.deployments import replicas
from app.errors import Code, RunError
from app.jobs import repository
from app.jobs.repository import Move
from app.models import Artifact, Checkpoint, DeploymentReplica, Job, new_id, now
from app.queue import AnyDoorbell
from app.states import WAKING, DeploymentState, JobState
from app.storage import Published, Storage
from workers.checkpoints import RESUMABLE, best_of, score_of
from workers.ladder import Rung, changed
from workers.told import diagnosed, is_step, patched, upsert_metrics

Line = dict[str, Any]
_LEVELS = ("info", "warn", "error")
_STUCK = 2
_LARGEST_STEP = 2**31 - 1
"""Attempts in a row without a step gained, after which more of them are waste."""
_LONGEST_BACKOFF = 600.0


@dataclass(frozen=True)
class Flags:
    """What the row says to the worker that runs it."""

    lost: bool = False
    cancel: bool = False
    pause: bool = False
    preempt_for: str | None = None


@dataclass(frozen=True)
class Finished:
    """A published output, ready for its row."""

    artifact_id: str
    kind: str
    name: str
    facts: dict[str, Any]
    published: Published


class Crash(NamedTuple):
    """A run that broke off: its status, a sentence, and what is known beyond that: a code, what to do, the field.

    ``transient``: what it waits for is outside, so that not getting further is no sign of a loop.
    """

    status: int
    reason: str
    code: Code | None = None
    hint: str | None = None
    param: str | None = None
    transient: bool = False


# The way out of RUNNING is worth waiting for: while nobody can write, nobody can reap either. A name and version that
# another job took at the same moment are settled by trying again.
persistent = retry(
    retry=retry_if_exception_type(SQLAlchemyError),
    wait=wait_exponential_jitter(multiplier=0.2, max=5),
    stop=stop_after_delay(300),
    reraise=True,
)


class Ledger:
    """One attempt's way to the database."""

    def __init__(self, database: Database, storage: Storage, doorbell: AnyDoorbell, job: Job, worker_id: str) -> None:
        self._database = database
        self._storage = storage
        self._doorbell = doorbell
        self.job = job
        self.worker_id = worker_id
        self._mine = repository.held_by(worker_id, job.fence)

    def beat(self, lines: Sequence[Line], run_seconds: float | None = None) -> Flags:
        """T3, T4: the attempt lives, this is what it said since the last beat, and how long the job has run in all."""
        reached("beat.before")
        values: dict[str, Any] = {}
        metrics: list[dict[str, Any]] = []
        with self._database.write() as session:
            clock = {} if run_seconds is None else {"run_seconds": run_seconds}
            row = repository.heartbeat(session, self.job.id, self.worker_id, self.job.fence, clock)
            if row is None:
                return Flags(lost=True)
            for line in lines:
                self._take(session, row, line, values, metrics)
            if values:
                repository.heartbeat(session, self.job.id, self.worker_id, self.job.fence, values)
            if metrics:
                upsert_metrics(session, metrics)
            flags = Flags(
                cancel=row.cancel_requested_at is not None,
                pause=row.pause_requested_at is not None,
                preempt_for=row.preempt_for,
            )
        if any(line["kind"] == "checkpoint" for line in lines):
            view.refresh_job(self._database, self._storage, self.job.id)
        return flags

    def _take(
        self, session: Session, row: Job, line: Line, values: dict[str, Any], metrics: list[dict[str, Any]]
    ) -> None:
        kind = line["kind"]
        if kind == "event":
            level = line.get("level") if line.get("level") in _LEVELS else "info"
            data = line.get("data") if isinstance(line.get("data"), dict) else {}
            self.note(session, str(line.get("code", "message"))[:64], str(line.get("message", "")), str(level), data)
        elif kind == "phase":
            values["phase"] = str(line.get("phase"))[:32]
        elif kind == "progress":
            values["progress"] = {key: line[key] for key in line if key not in ("t", "kind")}
        elif kind == "metric" and is_step(line.get("step")) and isinstance(line.get("values"), dict):
            metrics += [
                {"job_id": self.job.id, "step": line["step"], "name": str(name)[:64], "value": value}
                for name, value in line["values"].items()
                if isinstance(value, int | float) and not isinstance(value, bool) or value is None
            ]
        elif kind == "health":
            values["health"] = diagnosed(values.get("health", row.health), line)
        elif kind == "resolved":
            values["resolved_spec"] = patched(values.get("resolved_spec", row.resolved_spec), line)
        elif kind == "checkpoint" and is_step(line.get("step")) and isinstance(line.get("bytes"), int):
            self._checkpoint(session, line, values)

    def _checkpoint(self, session: Session, line: Line, values: dict[str, Any]) -> None:
        step: int = line["step"]
        path = Path(str(line.get("path")))
        if not path.is_relative_to(self._storage.job_dir(self.job.id)):
            return
        reached("checkpoint.before_row")
        relative = str(path.relative_to(self._storage.root))
        metrics = line["metrics"] if isinstance(line.get("metrics"), dict) else {}
        scores = [(step, score_of(line))]
        kept = []
        for old in repository.checkpoints(session, self.job.id):
            # An attempt that starts over reaches the same step again; and the run rotates its oldest away.
            if old.step == step or not (self._storage.root / old.path).is_dir():
                session.delete(old)
            else:
                kept.append(old)
        records = [self._storage.checkpoint_record(self._storage.root / old.path) for old in kept]
        scores += [(old.step, score_of(record)) for old, record in zip(kept, records, strict=True)]
        best = best_of(scores)
        for number, (old, record) in enumerate(zip(kept, records, strict=True)):
            old.best = old.step == best
            if 0 < number <= RESUMABLE:  # thinned just now, or by the one before
                files = record.get("files", {})
                old.bytes = sum(entry["bytes"] for entry in files.values()) or old.bytes
        session.flush()
        session.add(
            Checkpoint(
                id=new_id("ftckpt"),
                job_id=self.job.id,
                fence=self.job.fence,
                step=step,
                path=relative,
                bytes=line["bytes"],
                metrics=metrics,
                best=step == best,
            )
        )
        values |= {"ckpt_ref": relative, "ckpt_step": step}
        self.note(session, "checkpoint_save", f"Checkpoint at step {step}.", "info", {"step": step})

    def note(self, session: Session, code: str, message: str, level: str, data: dict[str, Any] | None = None) -> bool:
        """An event of this attempt."""
        return repository.note(session, self.job.id, Move(JobState.RUNNING, code, message, level, data), *self._mine)

    @persistent
    def succeed(self, result: dict[str, Any], finished: Sequence[Finished]) -> bool:
        """T5 with the artifact rows; never after a cancellation was asked for."""
        with self._database.write() as session:
            if finished and session.get(Artifact, finished[0].artifact_id) is not None:
                return True  # the commit went through, and the answer to it got lost
            for output in finished:
                artifacts.add(
                    session,
                    self.job,
                    id=output.artifact_id,
                    name=output.name,
                    kind=output.kind,
                    bytes=output.published.bytes,
                    sha256=output.published.sha256,
                    base_chain=list(output.facts.get("base_chain", [])),
                    base_artifact_id=output.facts.get("base_artifact_id"),
                    learning=output.facts.get("learning"),
                    facts={key: output.facts[key] for key in output.facts if key not in ("base_chain", "learning")},
                )
                self._say_hidden(session, output)
            ids = [output.artifact_id for output in finished]
            learning = next((found for output in finished if (found := output.facts.get("learning"))), None)
            move = Move(
                JobState.SUCCEEDED,
                "job_complete",
                "The job succeeded.",
                data={"artifacts": ids},
                values={"result": {**result, "artifact_ids": ids}, "learning": learning},
            )
            moved = self._leave(session, move, Job.cancel_requested_at.is_(None))
            if not moved:
                session.rollback()
            reached("succeed.before_commit")
        reached("succeed.after_commit")
        if moved:
            view.refresh_job(self._database, self._storage, self.job.id)
        return moved

    def _say_hidden(self, session: Session, output: Finished) -> None:
        """An alias that was made while the job ran goes before names of artifacts."""
        if output.kind != "report" and aliases.get(session, self.job.project_id, output.name) is not None:
            message = f"{output.name} is an alias by now: what the job left is reached by its version or its id."
            self.note(session, "name_is_alias", message, "warn", {"artifact": output.artifact_id})

    @persistent
    def fail(self, error: RunError, exit_code: int | None = None, result: dict[str, Any] | None = None) -> bool:
        """T6: final, with what the user can do about it, and what the run had found out by then."""
        detail = {"message": error.message[:4000], "hint": error.hint, "param": error.param}
        values: dict[str, Any] = {"error_code": str(error.code), "error_detail": detail}
        values |= {"exit_code": exit_code, "result": result or None}
        move = Move(JobState.FAILED, "job_error", error.message, "error", {"error_code": str(error.code)}, values)
        with self._database.write() as session:
            return self._leave(session, move, Job.cancel_requested_at.is_(None))

    @persistent
    def requeue(
        self,
        code: str,
        message: str,
        *,
        delay: float = 0.0,
        give_back: bool = False,
        exit_code: int | None = None,
        broken_off: Job | None = None,
        values: Mapping[str, Any] = MappingProxyType({}),
    ) -> bool:
        """T7: another attempt, later. ``give_back`` leaves the attempt unspent; ``values`` are more columns."""
        columns: dict[str, Any] = {
            **values,
            "delay_seconds": delay,
            "not_before": now() + timedelta(seconds=delay) if delay else None,
            "exit_code": exit_code,
            **repository.back_in_queue(broken_off),
        }
        if give_back:
            columns["attempt"] = Job.attempt - 1
        move = Move(JobState.QUEUED, code, message, "warn", {"delay_seconds": delay}, columns)
        with self._database.write() as session:
            moved = self._leave(session, move, Job.cancel_requested_at.is_(None))
            reached("requeue.before_commit")
        reached("requeue.after_commit")
        return moved

    @persistent
    def sleep(self, deployment_id: str) -> bool:
        """Nobody used the engine, so it ended or sleeps: the replica's job waits, unless it was woken since."""
        with self._database.write() as session:
            # Locked in the order in which waking locks them.
            replicas.lock(session, deployment_id)
            asleep = session.get_one(DeploymentReplica, self.job.id).status == DeploymentState.SLEEPING
            values = repository.back_in_queue() | {"delay_seconds": 0.0, "not_before": None, "attempt": Job.attempt - 1}
            values |= {"paused_at": now()} if asleep else {"paused_at": None, "phase": WAKING}
            move = Move(JobState.QUEUED, "engine_asleep", "Nobody used the engine; a request wakes it.", values=values)
            return self._leave(session, move, Job.cancel_requested_at.is_(None))

    @persistent
    def adjust(self, rung: Rung, exit_code: int) -> bool:
        """Memory ran out: again from the newest checkpoint, as the next rung of the ladder says; no attempt spent."""
        with self._database.write() as session:
            job = session.get_one(Job, self.job.id)
            values = {
                **repository.back_in_queue(),
                "resolved_spec": changed(job.resolved_spec, rung.values),
                "delay_seconds": 0.0,
                "not_before": None,
                "exit_code": exit_code,
                "attempt": Job.attempt - 1,
            }
            message = f"Out of memory; trying again: {rung.message}"
            data = {name.rpartition(".")[2]: value for name, value in rung.values.items()}
            move = Move(JobState.QUEUED, "out_of_memory_adjusted", message, "warn", data, values)
            return self._leave(session, move, Job.cancel_requested_at.is_(None))

    @persistent
    def hold(self, reason: str, message: str, *, delay: float, exit_code: int | None = None, **data: Any) -> bool:
        """T12 of a running job: back into the queue with a hold reason, the attempt unspent."""
        values: dict[str, Any] = {
            **repository.back_in_queue(),
            "hold_reason": reason,
            "delay_seconds": delay,
            "not_before": now() + timedelta(seconds=delay),
            "exit_code": exit_code,
            "attempt": Job.attempt - 1,
        }
        move = Move(JobState.QUEUED, f"hold_{reason}", message, "warn", {"delay_seconds": delay, **data}, values)
        with self._database.write() as session:
            return self._leave(session, move, Job.cancel_requested_at.is_(None))

    @persistent
    def prepared(self, reference: str) -> bool:
        """The inputs are ready: back into the queue, for the slot that the job itself needs, as if it had never run."""
        values: dict[str, Any] = {
            **repository.back_in_queue(),
            "slot_class": Job.next_class,
            "next_class": None,
            "prepared_ref": reference,
            "attempt": 0,
            "delay_seconds": 0.0,
            "not_before": None,
        }
        move = Move(JobState.QUEUED, "inputs_ready", "The inputs are ready.", data={"path": reference}, values=values)
        with self._database.write() as session:
            return self._leave(session, move, Job.cancel_requested_at.is_(None), Job.next_class.is_not(None))

    @persistent
    def prepare_again(self, file: str) -> bool:
        """What was made ready is damaged or gone: back to the stage before."""
        values: dict[str, Any] = {
            **repository.back_in_queue(),
            "next_class": Job.slot_class,
            "slot_class": "light",
            "prepared_ref": None,
            "attempt": Job.attempt - 1,
        }
        message = f"The inputs that were made ready are damaged ({file}); they are made again."
        move = Move(JobState.QUEUED, "prepared_rejected", message, "warn", {"file": file}, values)
        with self._database.write() as session:
            return self._leave(session, move, Job.cancel_requested_at.is_(None))

    @persistent
    def cancelled(self, message: str = "The run was stopped.") -> bool:
        """T11: what was asked for came true."""
        move = Move(JobState.CANCELLED, "job_cancelled", message, "warn")
        with self._database.write() as session:
            return self._leave(session, move, Job.cancel_requested_at.is_not(None))

    def _leave(self, session: Session, move: Move, *guards: Any) -> bool:
        after_commit(session, self._doorbell.ring)  # something may wait for this job or its slot
        return repository.transition(session, self.job.id, JobState.RUNNING, move, *self._mine, *guards)

    def crashed(self, crash: Crash, log_tail: str, *, again: bool = True, backoff: float = 5.0) -> bool:
        """A run that broke off: again after a pause that doubles, or final.

        Final when ``again`` is False, when the attempts are spent, or when it got no further two attempts in a row.
        """
        with self._database.read() as session:
            job = session.get_one(Job, self.job.id)  # with the checkpoints of this attempt
        step = int((job.progress or {}).get("step") or -1)
        further = step > job.reached_step or job.ckpt_step > job.prev_attempt_step
        stuck = 0 if further else job.stuck + 1
        # What counts in bytes goes beyond what the column holds.
        progress = {"reached_step": min(max(step, job.reached_step), _LARGEST_STEP), "stuck": stuck}
        # Who asks for more attempts than the default gets more of these as well.
        looping = not crash.transient and stuck >= max(_STUCK, job.max_attempts - 1)
        starving = crash.code is Code.HOST_OUT_OF_MEMORY and job.attempt > 1
        if again and not looping and not starving and not repository.attempts_spent(job):
            count = repository.next_count(job)
            delay = min(backoff * 2 ** (count - 1), _LONGEST_BACKOFF) if count else 0.0
            code = str(crash.code) if crash.code is not None else "runner_killed"
            message = f"{crash.reason} Trying again."
            return self.requeue(code, message, delay=delay, exit_code=crash.status, broken_off=job, values=progress)
        return self.fail(_final(crash, job, looping and again, log_tail), crash.status)


def _final(crash: Crash, job: Job, looping: bool, log_tail: str) -> RunError:
    """What a crash that is not tried again says."""
    hint = crash.hint or (f"The end of its log: {log_tail[-1500:]}" if log_tail else "Its log is empty.")
    code = crash.code or (Code.KILLED if crash.status < 0 else Code.CRASHED)
    if crash.code is Code.HOST_OUT_OF_MEMORY:
        hint = "Lower per_device_train_batch_size or training.max_length, use QLoRA, or run fewer jobs beside it."
    spent = repository.attempts_spent(job)
    if looping and not spent and crash.code is None:
        code = Code.CRASH_LOOP
    where = f" It got no further than step {job.reached_step}." if looping and job.reached_step >= 0 else ""
    made = f"{job.attempt} attempts were made." if job.attempt != 1 else "One attempt was made."
    return RunError(code, f"{crash.reason} {made}{where}", hint=hint, param=crash.param)
