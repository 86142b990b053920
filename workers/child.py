"""A process of an attempt: how it is started, heard, and ended."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app import crashpoints
from app.catalog import Catalog
from app.models import Job
from app.processes import LIFE_FD, SILENCE, TOKEN, kill_ladder
from app.settings import Settings
from workers.context import EVENTS, LOG
from workers.journal import Tail
from workers.ledger import Line
from workers.warm import Spare, hand_over

log = logging.getLogger(__name__)
PASSED_ON = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "HF_HOME",
    "HF_ENDPOINT",
    "XDG_CACHE_HOME",
    "LD_LIBRARY_PATH",
    crashpoints.VARIABLE,
)
# What opens the hub: for those that fetch from it, and for operations that ask for it.
HUB_TOKEN = ("HF_TOKEN",)
_LOG_CAP = 256 << 20
TICK_SECONDS = 0.5


class Child:
    """A process of an attempt: its life pipe, its log, its journal.

    ``secrets`` are variables that it gets beside ``environment``.
    """

    def __init__(
        self,
        module: str,
        folder: Path,
        token: str,
        environment: Mapping[str, str],
        spare: Spare | None = None,
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.token = token
        self.tail = Tail(folder / EVENTS)
        secrets = secrets or {}
        if spare is not None and hand_over(spare, folder, token, {**_differing(environment), **secrets}):
            self.process, self._life = spare.process, spare.life
        else:
            self.process, self._life = self._spawn(module, {**environment, **secrets})
        self._closed = threading.Event()
        self._ticking = threading.Thread(target=self._tick, name="tick", daemon=True)
        self._ticking.start()

    def _spawn(self, module: str, environment: Mapping[str, str]) -> "tuple[subprocess.Popen[bytes], int]":
        # A file, not a pipe, takes the output: the end of this process neither blocks nor breaks the child.
        with (self.folder / LOG).open("ab") as log:
            read_end, life = os.pipe()
            process = subprocess.Popen(
                [sys.executable, "-I", "-m", module, str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**environment, TOKEN: self.token, LIFE_FD: str(read_end), "SPT_NOENV": "1"},
                pass_fds=[read_end],
                start_new_session=True,
            )
        os.close(read_end)
        os.set_blocking(life, False)  # a child that reads nothing must not block us
        return process, life

    def lines(self) -> list[Line]:
        """What the child told since the last call."""
        return list(self.tail.read())

    def _tick(self) -> None:
        """Tells the child every second that this process lives; it stops where it is when it hears nothing."""
        while not self._closed.wait(TICK_SECONDS):
            with contextlib.suppress(OSError):
                os.write(self._life, b".")

    def trim_log(self) -> None:
        """Keeps its log bounded."""
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
        if self.tail.skipped:
            log.warning("%s: %d lines of its journal made no sense", self.token, self.tail.skipped)
        self._closed.set()
        self._ticking.join()
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


OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""For a runner without a network: its libraries do not even try, and say so at once."""
_OF_A_GPU = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")


def _differing(environment: Mapping[str, str]) -> dict[str, str]:
    """What an attempt's environment has beyond a spare's."""
    return {name: environment[name] for name in _OF_A_GPU if name in environment}


def environment(settings: Settings, gpu: str | None) -> dict[str, str]:
    """A child's environment: a short list of ours, and what keeps libraries quiet."""
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    if gpu is not None:
        # nvidia-smi, by which slots are numbered, counts by bus; CUDA by itself counts the fastest first.
        passed |= dict(zip(_OF_A_GPU, (gpu, "PCI_BUS_ID"), strict=True))
    return {
        **passed,
        "PYTHONUNBUFFERED": "1",
        SILENCE: str(2 * settings.lease_seconds),
        # Threads that spin while they wait starve each other as soon as the cores are shared with an engine.
        "GOMP_SPINCOUNT": "1000",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # Plain HTTP: what breaks off goes on by Range, mirrors speak it, and nothing is hashed by a service of its own.
        "HF_HUB_DISABLE_XET": "1",
        # A token that lies about on this machine is sent by whoever was given it, and by nobody else.
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "DO_NOT_TRACK": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }


def secrets_for(catalog: Catalog, job: Job, inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Variables of this process that the job's runner may see: those of its operation, and the hub's where it fetches.

    A run whose inputs were made ready before fetches nothing, so a training process never holds the hub's token.
    """
    operation = catalog.operations.get(job.type)
    prefixes = operation.variables if operation is not None else ()
    fetches = job.next_class is not None or not catalog.prepares(job.type, job.algorithm)
    if fetches and _to_be_fetched(inputs):
        prefixes += HUB_TOKEN
    return {name: value for name, value in os.environ.items() if prefixes and name.startswith(prefixes)}


def goes_offline(catalog: Catalog, job: Job, inputs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the job's runner is to have no network: its operation wants none, and nothing is left to fetch."""
    operation = catalog.operations.get(job.type)
    return operation is not None and operation.offline and not _to_be_fetched(inputs)


def _to_be_fetched(inputs: Mapping[str, Mapping[str, Any]]) -> bool:
    return any(entry.get("hub") and not entry.get("path") for entry in inputs.values())


def token_of(settings: Settings, job: Job, slot_id: str) -> str:
    """Names an attempt so that no other installation's processes are ever hit."""
    return f"{settings.instance}:{job.id}:{job.fence}:{slot_id}"
