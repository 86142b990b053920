"""How an attempt ended, and what follows: its result published, its error told, another attempt, a hold."""

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from app import disk, states
from app.artifacts import inspect
from app.errors import Code, RunError
from app.models import Job, new_id
from app.specs import RetryPolicy
from app.storage import COMPLETE, Storage
from workers.checkpoints import clear_scratch
from workers.context import ATTEMPT, LOG, PREPARED, RESULT
from workers.ladder import read_rung
from workers.ledger import Crash, Finished, Flags, Ledger
from workers.reproduced import compared, versions

Why = Literal["stalled", "wall_time"]
"""Why the supervisor itself ended a run."""
# Statuses that a run chooses when it knows what is wrong; another attempt would end the same way.
PERMANENT = {
    states.EXIT_BAD_DATA: Code.BAD_DATA,
    states.EXIT_NON_FINITE: Code.NON_FINITE_LOSS,
    states.EXIT_OUT_OF_MEMORY: Code.OUT_OF_MEMORY,
    states.EXIT_GATED: Code.GATED_MODEL,
    states.EXIT_BAD_SPEC: Code.BAD_SPEC,
}
DISK_FULL_SECONDS = 300.0
"""Pause of a job that found no room; the reconciler ends it as soon as there is more than it had."""
_LOG_KEPT = 64 << 10


class Outcome:
    """The end of one attempt. ``beating`` keeps the job ours while files are hashed; ``reserve`` is for the disk."""

    def __init__(
        self,
        job: Job,
        folder: Path,
        storage: Storage,
        ledger: Ledger,
        beating: Callable[[], AbstractContextManager[None]],
        reserve: int,
    ) -> None:
        self._reserve = reserve
        self._job = job
        self._folder = folder
        self._storage = storage
        self._ledger = ledger
        self._beating = beating
        policy = RetryPolicy.model_validate(job.resolved_spec.get("retry") or {})
        self._retried, self._backoff = policy.exit_codes, policy.backoff_seconds

    def settle(
        self, status: int, flags: Flags, *, stopping: bool, why: Why | None, starved: bool, log_tail: str
    ) -> None:
        """Leaves RUNNING. ``result.json`` is believed first, then the reason, then the exit status.

        ``starved``: the kernel killed for memory while the run lived.
        """
        try:
            result = _result(self._folder)
        except ValueError as fault:
            self._ledger.fail(RunError(Code.PROTOCOL, f"the run left a result that cannot be read: {fault}"), status)
            return
        if result is not None and result.get("status") == "ok":
            self._publish_or_fail(result, status)
        elif result is not None:
            self._fail(_error_of(result), status, result, log_tail)
        elif why == "wall_time":
            error = RunError(
                Code.WALL_TIME_EXCEEDED,
                f"the job used up its {self._job.wall_seconds:g} s in slots",
                hint="Raise limits.wall_seconds; GET /jobs/{id}/checkpoints shows what it left.",
            )
            self._ledger.fail(error, status)
        elif why == "stalled":
            self._crashed(Crash(status, "The run said nothing for limits.stall_seconds.", Code.STALLED), log_tail)
        elif flags.pause:
            self._ledger.requeue("job_paused", "On hold; resume puts it back.", give_back=True, exit_code=status)
        elif flags.preempt_for:
            message = f"Made room for {flags.preempt_for}; the job goes on when there is a slot again."
            self._ledger.requeue("job_preempted", message, give_back=True, exit_code=status)
        elif status == states.EXIT_CHECKPOINTED or stopping:
            message = "The worker is stopping; the job runs again."
            self._ledger.requeue("job_interrupted", message, give_back=True, exit_code=status)
        elif status == states.EXIT_DONE:
            self._ledger.fail(RunError(Code.PROTOCOL, "the run ended without a result"), status)
        elif status in PERMANENT:
            hint = f"The end of its log: {log_tail[-1500:]}" if log_tail else None
            self._ledger.fail(RunError(PERMANENT[status], f"the run exited with status {status}", hint=hint), status)
        elif status == states.EXIT_DISK_FULL:
            self._hold_for_disk(status)
        else:
            code = Code.HOST_OUT_OF_MEMORY if starved and status == -signal.SIGKILL else None
            self._crashed(Crash(status, _how_it_ended(status), code), log_tail)

    def _crashed(self, crash: Crash, log_tail: str) -> None:
        again = self._retried is None or crash.status in self._retried
        self._ledger.crashed(crash, log_tail, again=again, backoff=self._backoff)

    def _fail(self, error: RunError, status: int, left: dict[str, Any], log_tail: str) -> None:
        rung = read_rung(left.get("adjust")) if error.code is Code.OUT_OF_MEMORY else None
        if error.code is Code.DISK_FULL:
            self._hold_for_disk(status, error.message)
        elif error.transient:
            sentence = error.message if error.message.endswith(".") else f"{error.message}."
            self._crashed(Crash(status, sentence, error.code, error.hint, error.param, transient=True), log_tail)
        elif rung is not None:
            self._ledger.adjust(rung, status)
        else:
            self._ledger.fail(error, status, left.get("result"))

    def _hold_for_disk(self, status: int, why: str = "the disk is full") -> None:
        """First goes what nobody can use, so that this very hold can be written, and the log's beginning.

        The job was not content with what is free then, so it waits for more: bytes, or files that can be made.
        """
        root = self._storage.root
        of_files = disk.free_files(root) < disk.FEW_FILES
        self._let_go()
        free = disk.free_bytes(root)
        more = 0 if of_files else free + self._reserve
        facts = {"needed_bytes": max(2 * self._reserve, more), "free_bytes": free}
        if of_files:
            facts["needed_files"] = disk.free_files(root) + disk.FEW_FILES
        message = f"{why[:1].upper()}{why[1:]}; the job goes on when there is more room."
        self._ledger.hold("disk_full", message, delay=DISK_FULL_SECONDS, exit_code=status, **facts)

    def _let_go(self) -> None:
        clear_scratch(self._folder.parent, self._job.fence)
        for checkpoint in (self._folder / "ckpt").glob("checkpoint-*"):
            if not (checkpoint / COMPLETE).exists():
                shutil.rmtree(checkpoint, ignore_errors=True)
        if self._job.next_class is not None:
            shutil.rmtree(self._folder / PREPARED, ignore_errors=True)
        log = self._folder / LOG
        with contextlib.suppress(OSError), log.open("r+b") as file:
            if os.fstat(file.fileno()).st_size > _LOG_KEPT:
                file.seek(-_LOG_KEPT, os.SEEK_END)
                tail = file.read()
                file.truncate(0)
                file.seek(0)
                file.write(tail)

    def _publish_or_fail(self, result: dict[str, Any], status: int) -> None:
        try:
            with self._beating():  # hashing a large model takes longer than a lease
                if self._job.next_class is not None:
                    self._commit_prepared()
                else:
                    self._publish(result)
        except RunError as error:
            self._ledger.fail(error, status)
        except OSError as error:
            if error.errno in states.DISK_FULL_ERRORS:
                self._hold_for_disk(status)
            else:
                self._ledger.fail(RunError(Code.STORAGE_ERROR, f"the result cannot be stored: {error}"), status)

    def _commit_prepared(self) -> None:
        """Makes the prepared inputs durable, then lets the job wait for its own slot."""
        folder = self._folder / PREPARED
        self._storage.commit_checkpoint(folder, 0)
        self._ledger.prepared(str(folder.relative_to(self._storage.root)))

    def _publish(self, result: dict[str, Any]) -> None:
        finished: list[Finished] = []
        for output in result.get("outputs", []):
            facts = {**lineage(self._job, self._folder), **output["facts"]}
            artifact_id = new_id("art")
            folder = self._folder / output["folder"]
            about = {"job_id": self._job.id, "fence": self._job.fence, "spec_sha256": self._job.spec_sha256, **facts}
            if template := inspect.template_sha256(folder):
                about["chat_template_sha256"] = template
            published = self._storage.publish(folder, artifact_id, about, output.get("hashed") or {})
            name = output["name"] or self._job.experiment_name
            finished.append(Finished(artifact_id, output["kind"], name, facts, published))
        found = {**result.get("result", {}), "versions": versions()}
        if self._job.reproduces is not None and finished:
            found["reproduced"] = compared(self._storage, self._job.reproduces, finished[0].artifact_id)
        if not self._ledger.succeed(found, finished):
            for item in finished:  # cancelled or taken over meanwhile: what no row points to goes
                shutil.rmtree(self._storage.artifact_dir(item.artifact_id), ignore_errors=True)


def lineage(job: Job, folder: Path) -> dict[str, Any]:
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
    # Of several, all that each was made from, once.
    merged = [field for field in inputs if field.startswith(("adapters.", "models.")) and field.count(".") == 1]
    found = merged or [field for field in ("adapter", "model") if field in inputs][:1]
    chains = [_made_from(inputs[field]) for field in found]
    if job.type == "merge" and "base_model" in inputs:
        # It begins with the base that was merged into, which need not be the one that an adapter was trained on.
        base = _made_from(inputs["base_model"])
        own = [[] if field.startswith("models.") else _root(inputs, field) for field in found]
        chains = [base, *(chain[len(root) :] for chain, root in zip(chains, own, strict=True))]
    return {"base_chain": list(dict.fromkeys(link for chain in chains for link in chain))} if found else {}


def _made_from(entry: Mapping[str, Any]) -> list[str]:
    """An input's own chain; of one that comes from elsewhere all that is known is what it was called."""
    return list(entry.get("base_chain") or [entry["pinned"]])


def _root(inputs: Mapping[str, Mapping[str, Any]], field: str) -> list[str]:
    """The beginning of an adapter's chain that is the model which it was trained on, not what was trained."""
    if f"{field}.base" not in inputs:
        return []
    root, chain = _made_from(inputs[f"{field}.base"]), _made_from(inputs[field])
    return root if chain[: len(root)] == root else chain[:1]


def _result(folder: Path) -> dict[str, Any] | None:
    """What the run left; None without a file. Raises ValueError for one that is no object of ours."""
    try:
        value = json.loads((folder / RESULT).read_bytes())
    except OSError:
        return None
    outputs = value.get("outputs", []) if isinstance(value, dict) else None
    if not isinstance(outputs, list) or not all(isinstance(entry, dict) for entry in outputs):
        raise ValueError("it is not of the shape that a runner writes")
    if any(not isinstance(entry.get("folder"), str) or not isinstance(entry.get("facts"), dict) for entry in outputs):
        raise ValueError("an output has no folder or no facts")
    found: dict[str, Any] = value
    return found


def _error_of(result: dict[str, Any]) -> RunError:
    error = result.get("error") or {}
    try:
        code = Code(str(error.get("code")))
    except ValueError:
        code = Code.RUN_FAILED
    return RunError(
        code,
        str(error.get("message", "the run failed")),
        hint=error.get("hint"),
        param=error.get("param"),
        transient=result.get("transient") is True,
    )


def _how_it_ended(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"The run was ended by {signal.Signals(-status).name}."
    return f"The run exited with status {status}."
