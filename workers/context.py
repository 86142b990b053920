"""What a run sees of the world: the runner's implementation of ``RunContext``, over an attempt directory."""

import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from app.catalog import ArtifactKind, Catalog, HealthStatus, Served
from app.errors import Code, RunError
from app.storage import KEPT, Storage
from workers.checkpoints import rotate
from workers.journal import Journal, finite
from workers.staging import stage

ATTEMPT = "attempt.json"
RESULT = "result.json"
EVENTS = "events.jsonl"
LOG = "log.txt"
PREPARED = "prepared"
FETCHED = "fetched.json"
RANKS = "ranks"
SERVED = "served.json"
_PROGRESS_SECONDS = 0.5


@dataclass(frozen=True)
class Output:
    """A folder that becomes an artifact."""

    kind: str
    name: str | None
    folder: str
    facts: dict[str, Any]
    hashed: dict[str, str] = field(default_factory=dict)
    """sha256 of files whose writer took it; the others are hashed when the folder is published."""


def rank() -> int:
    """Which of a run's processes this is: torchrun says it where there are several."""
    return int(os.environ.get("RANK", "0"))


def result_path(attempt_dir: Path) -> Path:
    """Where a run says how it ended. Of the ranks beside the first that is kept for when the first says nothing."""
    return attempt_dir / (RESULT if rank() == 0 else f"{RANKS}/{rank()}.json")


def _holds(spec: Any, path: str) -> bool:
    """Whether a spec has a text at this place."""
    for step in path.split("."):
        spec = spec.get(step) if isinstance(spec, dict) else None
    return isinstance(spec, str)


class JobContext:
    """Reads ``attempt.json``, writes ``events.jsonl``, collects what goes into ``result.json``."""

    def __init__(self, attempt_dir: Path, attempt: Mapping[str, Any], catalog: Catalog) -> None:
        self.job_id: str = attempt["job_id"]
        self.work_dir = attempt_dir / "work"
        self.checkpoint_dir = attempt_dir / "ckpt"
        self.catalog = catalog
        prepared = attempt.get("prepared_dir")
        self.prepared_dir = Path(prepared) if prepared else None
        tasks = attempt.get("task_folder")
        self.task_folder = Path(tasks) if tasks else None
        self._preparing = attempt.get("stage") == "prepare"
        if self._preparing and self.prepared_dir is not None:
            self.prepared_dir.mkdir(exist_ok=True)
        resume = attempt.get("resume_from")
        self.resume_from = Path(resume) if resume else None
        self.continues = bool(attempt.get("continues"))
        """Whether that checkpoint is another job's."""
        self.values: dict[str, Any] = {}
        self.outputs: list[Output] = []
        self._dir = attempt_dir
        self._inputs: dict[str, dict[str, Any]] = attempt["inputs"]
        self._spec: dict[str, Any] = attempt.get("spec") or {}
        self._interpreters: Mapping[str, str] = attempt.get("interpreters") or {}
        # Of the ranks of a run on several GPUs the first tells what happens; the others write nothing.
        self.leads = rank() == 0
        live = attempt.get("live_socket")
        self.live_socket = Path(live) if live and self.leads else None
        self._journal = Journal(attempt_dir / EVENTS if self.leads else Path(os.devnull))
        self._stop = threading.Event()
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._committing: Future[None] | None = None
        self._last_progress = 0.0
        self._begun = time.monotonic()
        self._spent = float(attempt.get("run_seconds") or 0.0)
        self._asked: str | None = None
        self._memory_gb: float | None = attempt.get("memory_gb")
        self._reserve = int(attempt.get("reserve_bytes") or 0)
        self.work_dir.mkdir(exist_ok=True)
        self.checkpoint_dir.mkdir(exist_ok=True)

    def input(self, field: str) -> Path:
        """See RunContext."""
        entry = self.input_info(field)
        if entry.get("path"):
            return Path(entry["path"])
        if (fetched := self._fetched().get(field)) is not None:
            return Path(fetched)
        if entry.get("hub"):
            return self._fetch(field, entry["hub"], entry.get("revision"))
        hint = "name base_model: the base of this adapter is not known" if field == "base_model" else None
        raise RunError(Code.BAD_SPEC, f"{field} has no input", hint=hint, param=field)

    def input_info(self, field: str) -> Mapping[str, Any]:
        """See RunContext."""
        return self._inputs.get(field, {})

    def interpreter(self, name: Literal["quantize"]) -> Path:
        """See RunContext."""
        if found := self._interpreters.get(name):
            return Path(found)
        library, variable = "llm-compressor", "TUNESMITH_QUANTIZE_PYTHON"
        raise RunError(
            Code.ENGINE_MISSING,
            f"there is no Python environment with {library}",
            hint="Make one beside the project (python3 -m venv .venv-quantize; .venv-quantize/bin/pip install "
            f"llmcompressor), or set {variable} to an interpreter that has it.",
        )

    def _fetch(self, field: str, repo: str, revision: str | None) -> Path:
        self.phase("staging")
        plain = bool(self._inputs[field].get("plain"))
        folder, commit = stage(repo, revision, field, self, self._reserve, plain=plain)
        if _holds(self._spec, field):
            self.resolved(field, f"hub:{repo}@{commit}")  # the branch may move; this run, and its repetition, do not
        self._inputs[field] = {**self._inputs[field], "path": str(folder), "commit": commit}
        if self._preparing and self.prepared_dir is not None:
            text = json.dumps({**self._fetched(), field: str(folder)}, sort_keys=True)
            (self.prepared_dir / FETCHED).write_text(text)
        return folder

    def _fetched(self) -> dict[str, str]:
        """Folders of hub models that were fetched while the inputs were made ready, by field."""
        if self.prepared_dir is None:
            return {}
        try:
            found: dict[str, str] = json.loads((self.prepared_dir / FETCHED).read_bytes())
        except FileNotFoundError:
            return {}
        return {field: folder for field, folder in found.items() if Path(folder).is_dir()}

    def served(self, field: Literal["model", "baseline"]) -> Served | str:
        """See RunContext. Whoever watches the run hears what is asked, and writes the way to it into a file."""
        if field != self._asked:
            self._asked = field
            self._journal.write("asks", field=field)
        try:
            found = json.loads((self._dir / SERVED).read_bytes()).get(field)
        except FileNotFoundError:
            found = None
        if found is None:
            return "the way to its engine is being looked up"
        if "code" in found:
            raise RunError(Code(found["code"]), found["reason"], hint=found["hint"], param=found["param"])
        if "reason" in found:
            return str(found["reason"])
        return Served(tuple(map(Path, found["sockets"])), found["name"])

    def phase(self, name: str) -> None:
        """See RunContext."""
        self._journal.write("phase", phase=name)

    def event(self, code: str, message: str, *, level: Literal["info", "warn", "error"] = "info", **data: Any) -> None:
        """See RunContext."""
        self._journal.write("event", code=code, message=message, level=level, data=data)

    def health(self, check: str, status: HealthStatus, message: str | None = None, **facts: Any) -> None:
        """See RunContext."""
        numbers = {name: finite(fact) if isinstance(fact, float) else fact for name, fact in facts.items()}
        self._journal.write("health", check=check, status=status, message=message, facts=numbers)

    def progress(self, step: int, total_steps: int, **values: float | None) -> None:
        """See RunContext."""
        now = time.monotonic()
        if step < total_steps and now - self._last_progress < _PROGRESS_SECONDS:
            return
        self._last_progress = now
        numbers = {name: finite(value) for name, value in values.items()}
        self._journal.write("progress", step=step, total_steps=total_steps, **numbers)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See RunContext."""
        numbers = {name: finite(value) for name, value in values.items()}
        self._journal.write("metric", step=step, values=numbers)
        if not self.leads:
            return
        with (self._dir / "trainer_log.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")

    def checkpoint(
        self,
        path: Path,
        step: int,
        metrics: Mapping[str, float],
        *,
        keep: int | None = None,
        score: float | None = None,
    ) -> None:
        """See RunContext. Hashing, fsync and rotation run in a thread; one checkpoint at a time."""
        if not self.leads:
            return
        self.settle()
        numbers = {name: finite(value) for name, value in metrics.items()}
        score = finite(numbers.get("eval_loss") if score is None else score)
        self._committing = self._committer.submit(self._commit, path, step, numbers, keep, score)

    def settle(self) -> None:
        """Waits for the checkpoint that is being committed. Raises what went wrong with it."""
        if self._committing is not None:
            committing, self._committing = self._committing, None
            committing.result()

    def _commit(
        self, path: Path, step: int, numbers: Mapping[str, float | None], keep: int | None, score: float | None
    ) -> None:
        size = Storage.commit_checkpoint(path, step, numbers, score)
        # Before it is announced, so that whoever hears of it finds the others as they will stay.
        rotate(self._dir.parent, int(self._dir.name[1:]), keep)
        self._journal.write("checkpoint", path=str(path), step=step, bytes=size, metrics=numbers, score=score)

    def resolved(self, path: str, value: Any) -> None:
        """See RunContext."""
        self._journal.write("resolved", path=path, value=value)

    def tick(self) -> None:
        """See RunContext."""
        self._journal.write("tick")

    def spent_seconds(self) -> float:
        """See RunContext."""
        return self._spent + time.monotonic() - self._begun

    def memory_gb(self) -> float | None:
        """See RunContext."""
        return self._memory_gb

    def request_stop(self) -> None:
        """SIGTERM came."""
        self._stop.set()

    def stop_requested(self) -> bool:
        """See RunContext."""
        return self._stop.is_set()

    def output(self, kind: ArtifactKind, name: str | None = None, **facts: Any) -> Path:
        """See RunContext."""
        folder = self._dir / (f"out{len(self.outputs)}.tmp" if self.leads else f"out{len(self.outputs)}.{rank()}")
        folder.mkdir()
        self.outputs.append(Output(kind, name, folder.name, facts))
        return folder

    @property
    def kept_dir(self) -> Path:
        """See RunContext."""
        folder = self._dir.parent / KEPT
        folder.mkdir(exist_ok=True)
        return folder

    def drop_kept(self) -> None:
        """There will be no other attempt."""
        shutil.rmtree(self._dir.parent / KEPT, ignore_errors=True)

    def written(self, path: Path, sha256: str) -> None:
        """See RunContext."""
        for output in self.outputs:
            folder = self._dir / output.folder
            if path.is_relative_to(folder):
                output.hashed[path.relative_to(folder).as_posix()] = sha256

    def result(self, **values: Any) -> None:
        """See RunContext."""
        self.values |= values
