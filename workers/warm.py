"""Runners that have their libraries before they are needed: a start then takes a second instead of ten.

A spare is a runner that imported torch and its friends and waits. It knows no job, holds no token and no CUDA context.
An attempt takes it by one line on its life pipe: folder, token, GPUs. Used once, like every runner.
"""

import contextlib
import ctypes
import importlib
import json
import logging
import os
import select
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from app.processes import LIFE_FD, SPARE, TOKEN
from workers.context import LOG

log = logging.getLogger(__name__)
WARM = "--warm"
READY_FD = "TUNESMITH_READY_FD"
# The first attribute of each pulls in what lies behind the lazy front of its library.
LIBRARIES = (
    ("torch", "nn"),
    ("transformers", "AutoModelForCausalLM"),
    ("transformers", "AutoTokenizer"),
    ("transformers", "Trainer"),
    ("transformers", "LlamaForCausalLM"),
    ("transformers", "Qwen2ForCausalLM"),
    ("datasets", "Dataset"),
    ("accelerate", "Accelerator"),
    ("peft", "LoraConfig"),
    ("trl", "SFTTrainer"),
)
_LONGEST_TOKEN = 160
_PAUSE = 5.0
"""Between two spares, so that one which cannot live does not burn a core."""


@dataclass
class Spare:
    """A runner that waits; ``life`` is the writing end of its life pipe."""

    process: "subprocess.Popen[bytes]"
    life: int
    _said: int
    """Where it says that it is ready."""
    _ready: bool = False

    def is_ready(self) -> bool:
        """Whether it lives and has its libraries."""
        with contextlib.suppress(BlockingIOError):
            self._ready = self._ready or os.read(self._said, 1) == b"1"
        return self._ready and self.process.poll() is None

    def end(self) -> None:
        """Kills it, if it lives, and lets go of it."""
        self.process.kill()
        self.process.wait()
        self.let_go()
        os.close(self.life)

    def let_go(self) -> None:
        """It was taken: only its life pipe is needed now."""
        os.close(self._said)


class Spares(threading.Thread):
    """Keeps up to ``count`` spares. Its thread lives as long as the worker: they die with it, taken or not."""

    def __init__(self, instance: str, environment: Mapping[str, str], count: int) -> None:
        super().__init__(name="spares", daemon=True)
        self._instance = instance
        self._environment = dict(environment)
        self._count = count
        self._spares: list[Spare] = []
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._stopping = threading.Event()

    def run(self) -> None:
        """Until the worker stops."""
        while not self._stopping.is_set():
            try:
                with self._lock:
                    self._bury()
                    missing = len(self._spares) < self._count
                if missing:
                    spare = self._spawn()
                    with self._lock:
                        self._spares.append(spare)
            except OSError as error:  # this thread must not end: what it started would die
                log.warning("no spare runner can be started: %s", error)
            self._wanted.wait(_PAUSE)
            self._wanted.clear()

    def take(self) -> Spare | None:
        """One that has its libraries, or None."""
        with self._lock:
            found = next((spare for spare in self._spares if spare.is_ready()), None)
            if found is not None:
                self._spares.remove(found)
                self._wanted.set()
        return found

    def ready(self) -> int:
        """How many could be taken now."""
        with self._lock:
            return sum(spare.is_ready() for spare in self._spares)

    def stop(self) -> None:
        """Ends the spares; call it once no attempt is left."""
        self._stopping.set()
        self._wanted.set()
        if self.is_alive():
            self.join()
        with self._lock:
            for spare in self._spares:
                spare.end()
            self._spares.clear()

    def _bury(self) -> None:
        for spare in [spare for spare in self._spares if spare.process.poll() is not None]:
            log.warning("a spare runner ended by itself (status %s)", spare.process.returncode)
            self._spares.remove(spare)
            spare.end()

    def _spawn(self) -> Spare:
        life_read, life = os.pipe()
        ready, ready_write = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-m", "workers.runner", WARM],
                stdin=subprocess.DEVNULL,
                # Until it has a log of its own. What is wrong with a library, the attempt that needs it says.
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={
                    **self._environment,
                    # Room for the token of the attempt that will take it: /proc shows the memory of the start.
                    TOKEN: f"{self._instance}:{SPARE}:".ljust(_LONGEST_TOKEN, "-"),
                    LIFE_FD: str(life_read),
                    READY_FD: str(ready_write),
                    "SPT_NOENV": "1",
                },
                pass_fds=[life_read, ready_write],
                start_new_session=True,
            )
        finally:
            os.close(life_read)
            os.close(ready_write)
        os.set_blocking(life, False)
        os.set_blocking(ready, False)
        return Spare(process, life, ready)


def hand_over(spare: Spare, folder: Path, token: str, environment: Mapping[str, str]) -> bool:
    """Gives an attempt to a spare that was taken; False when it has died meanwhile.

    ``environment`` is only what differs from what the spare was started with.
    """
    order = json.dumps({"folder": str(folder), "token": token, "environment": dict(environment)}).encode()
    if len(token.encode()) <= _LONGEST_TOKEN and len(order) < select.PIPE_BUF:
        with contextlib.suppress(OSError):
            os.write(spare.life, order + b"\n")  # below PIPE_BUF: whole or not at all
            spare.let_go()
            return True
    spare.end()
    return False


# In the child


def await_attempt() -> Path:
    """Imports, says so, and waits for an attempt; its folder. Exits when the worker goes away first."""
    # Alone in a thread of low priority, because a process without rights cannot raise its own again.
    thread = threading.Thread(target=_import_libraries, name="imports")
    thread.start()
    thread.join()
    os.write(int(os.environ.pop(READY_FD)), b"1")
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(int(os.environ[LIFE_FD]), 1)
        if not byte:
            os._exit(0)
        line += byte
    order = json.loads(line)
    folder = Path(order["folder"])
    _wear(order["token"])
    os.environ.update(order["environment"])
    fd = os.open(folder / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for stream in (1, 2):
        os.dup2(fd, stream)
    os.close(fd)
    os.chdir(folder)
    return folder


def _import_libraries() -> None:
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    for module, name in LIBRARIES:
        with contextlib.suppress(ImportError, AttributeError):  # whoever needs it says what is wrong with it
            getattr(importlib.import_module(module), name)


def _wear(token: str) -> None:
    """Shows the attempt's token where ``/proc/<pid>/environ`` is read, in place of the spare's own."""
    os.environ[TOKEN] = token
    if sys.platform != "linux":
        return
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])  # env_start and env_end, fields 50 and 51 of proc(5)
    shown = ctypes.string_at(start, end - start)
    at = shown.find(f"{TOKEN}=".encode())
    value = at + len(TOKEN) + 1
    room = shown.index(b"\0", value) - value
    ctypes.memmove(start + value, token.encode().ljust(room, b"\0"), room)
