"""The parent of one serving engine: starts it, proves that it answers, and leaves nothing of it behind (stdlib only).

Run as ``python -I -m workers.replica <attempt_dir>`` in a session of its own, with the attempt's token in
``TUNESMITH_ATTEMPT`` and the life pipe's reading end in ``TUNESMITH_LIFE_FD``. What to start stands in
``attempt.json``; what happens is written to ``events.jsonl`` as lines of kind ``status``.

Exit status: 0 stopped by SIGTERM, 1 failed, 3 not ready within ``start_timeout``, 70 the supervisor is gone.
"""

import contextlib
import http.client
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from app import processes
from app.states import EXIT_LIFELINE_CUT
from workers.journal import Journal

EXIT_STOPPED = 0
EXIT_FAILED = 1
EXIT_START_TIMEOUT = 3

# What an engine may see of our environment; the rest comes from attempt.json.
PASSED_ON = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "XDG_CACHE_HOME",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
)
LOG_TAIL = 4096
LONGEST_SOCKET = 107
_TICK = 0.1
_FIRST_PROBES = 0.25

Sign = Literal["alive", "dead", "stop"]


@dataclass(frozen=True)
class Attempt:
    """``attempt.json``: made by the supervisor."""

    argv: list[str]
    env: dict[str, str]
    socket: str
    probe_path: str
    probe_body: dict[str, Any]
    start_timeout: float = 600
    health_path: str = "/health"
    probe_seconds: float = 15
    probe_timeout: float = 10
    probe_misses: int = 3
    busy_seconds: float = 120
    grace_seconds: float = 30
    sleep_mode: bool = False


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("engine", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Opens the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def answers(attempt: Attempt, timeout: float) -> bool:
    """Whether the engine is healthy *and* computes: a health route alone answers when the model hangs."""
    return healthy(attempt, timeout) and computes(attempt, timeout)


def healthy(attempt: Attempt, timeout: float) -> bool:
    """Whether the health route says 200."""
    return _ok(attempt, "GET", attempt.health_path, None, timeout)


def computes(attempt: Attempt, timeout: float) -> bool:
    """Whether one token, or one embedding, comes back."""
    return _ok(attempt, "POST", attempt.probe_path, json.dumps(attempt.probe_body), timeout)


def asleep(attempt: Attempt) -> bool:
    """Whether the engine was put to sleep: then it computes nothing, and is well."""
    if not attempt.sleep_mode:
        return False
    status, text = _answer(attempt, "GET", "/is_sleeping", None, attempt.probe_timeout)
    with contextlib.suppress(ValueError):
        return status == 200 and json.loads(text).get("is_sleeping") is True
    return False


def ask(attempt: Attempt) -> "queue.SimpleQueue[bool]":
    """Starts a probe that may take ``busy_seconds``; whether an answer came will lie in the queue."""
    answer: queue.SimpleQueue[bool] = queue.SimpleQueue()
    timeout = max(attempt.busy_seconds, attempt.probe_timeout)
    threading.Thread(target=lambda: answer.put(computes(attempt, timeout)), name="ask", daemon=True).start()
    return answer


def _ok(attempt: Attempt, method: str, path: str, body: str | None, timeout: float) -> bool:
    return _answer(attempt, method, path, body, timeout)[0] == 200


def _answer(attempt: Attempt, method: str, path: str, body: str | None, timeout: float) -> tuple[int, bytes]:
    """Status and text; status 0 when none comes."""
    connection = UnixConnection(attempt.socket, timeout)
    try:
        connection.request(method, path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


class Replica:
    """One engine from its start to its end."""

    def __init__(self, directory: Path, attempt: Attempt, token: str) -> None:
        self._directory = directory
        self._attempt = attempt
        self._token = token
        self._journal = Journal(directory / "events.jsonl")
        self._signs: queue.SimpleQueue[Sign] = queue.SimpleQueue()
        # Engines leave sockets and lock files in their temporary folder, even when they end in order. The name is
        # short, because a socket's path is.
        self._scratch = tempfile.mkdtemp(prefix="ts-")
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = threading.Event()
        self._cutting = False
        self._misses = 0

    def run(self, life_fd: int | None) -> int:
        """Everything; returns the exit status."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.signal(signal.SIGHUP, self._on_sighup)
        # Not SIGKILL, because somebody has to end the engine: SIGHUP does what the life pipe's end does.
        processes.harden(signal.SIGHUP)
        processes.become_subreaper()
        self._journal.write("status", status="starting")
        started = time.monotonic()
        # Both before the first thread: only a single-threaded process may fork and run code of its own.
        _post_guard(self._token, self._scratch)
        reason = self._start()
        if reason:
            return self._fail(reason, EXIT_FAILED)
        if life_fd is not None:
            processes.watch_lifeline(life_fd, self._cut)
        threading.Thread(target=self._probe, args=(started,), name="probe", daemon=True).start()
        while True:
            sign = self._next_sign()
            exited = self._engine_exited()
            if self._cutting:
                continue  # an end that we see now is our own doing
            if sign == "stop":
                return self._stop()
            if exited:
                return self._fail("engine_exited", EXIT_FAILED)
            if sign is not None:
                self._note(sign, time.monotonic() - started)
            if self._misses >= self._attempt.probe_misses:
                return self._fail("unresponsive", EXIT_FAILED)
            if not self._ready.is_set() and time.monotonic() - started > self._attempt.start_timeout:
                return self._fail("start_timeout", EXIT_START_TIMEOUT)

    def _start(self) -> str | None:
        """Starts the engine; a reason when it cannot be started."""
        path = Path(self._attempt.socket)
        if len(os.fsencode(path)) > LONGEST_SOCKET:
            return "socket_path_too_long"
        log = os.open(self._directory / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            path.unlink(missing_ok=True)
            self._process = subprocess.Popen(
                self._attempt.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                env=self._environment(),
                process_group=0,
                preexec_fn=processes.die_with_parent,
            )
        except (OSError, subprocess.SubprocessError) as error:
            os.write(log, f"the engine cannot be started: {error}\n".encode())
            return "engine_not_startable"
        finally:
            os.close(log)
        return None

    def _environment(self) -> dict[str, str]:
        passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        # setproctitle, which engines use, would else write over the environment that holds the token.
        ours = {"TMPDIR": self._scratch, processes.TOKEN: self._token, "SPT_NOENV": "1"}
        return {**passed, **self._attempt.env, **ours}

    def _probe(self, started: float) -> None:
        """In a thread of its own, so that a hanging engine does not delay SIGTERM."""
        attempt = self._attempt
        while not self._ready.is_set():
            # The first answer may compile kernels: it gets all the time there is.
            remaining = started + attempt.start_timeout - time.monotonic()
            if remaining > 0 and answers(attempt, remaining):
                self._signs.put("alive")
                self._ready.wait()
            time.sleep(_FIRST_PROBES)
        self._watch()

    def _watch(self) -> None:
        """A full queue is not a death: an unanswered probe stays where it stands in it, while health answers.

        A miss is a probe that failed, or one that is late while health does not answer either, or while no answer
        came for ``busy_seconds``. An engine that sleeps is asked nothing, and what it was asked before does not count.
        """
        attempt = self._attempt
        last = time.monotonic()
        asked: queue.SimpleQueue[bool] | None = None
        while True:
            time.sleep(attempt.probe_seconds)
            if asleep(attempt):
                asked, last = None, time.monotonic()
                continue
            asked = asked or ask(attempt)
            try:
                came = asked.get(timeout=attempt.probe_timeout)
            except queue.Empty:
                if asleep(attempt):
                    continue
                if time.monotonic() - last >= attempt.busy_seconds or not healthy(attempt, attempt.probe_timeout):
                    self._signs.put("dead")
                continue
            asked = None
            if not came and asleep(attempt):
                continue
            if came:
                last = time.monotonic()
            self._signs.put("alive" if came else "dead")

    def _note(self, sign: Sign, seconds: float) -> None:
        if sign == "dead":
            self._misses += 1
            self._journal.write("status", status="unhealthy", misses=self._misses)
            return
        if not self._ready.is_set() or self._misses:
            self._journal.write("status", status="ready", seconds=round(seconds, 2))
        self._misses = 0
        self._ready.set()

    def _next_sign(self) -> Sign | None:
        try:
            return self._signs.get(timeout=_TICK)
        except queue.Empty:
            return None

    def _engine_exited(self) -> bool:
        """Reaps adopted orphans on the way; the engine itself stays unreaped, so that its group's number stays ours."""
        assert self._process is not None
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return True
            if ended is None:
                return False
            if ended.si_pid == self._process.pid:
                return True
            with contextlib.suppress(ChildProcessError):
                os.waitpid(ended.si_pid, 0)

    def _stop(self) -> int:
        self._end(self._attempt.grace_seconds)
        self._journal.write("status", status="stopped")
        return EXIT_STOPPED

    def _fail(self, reason: str, status: int) -> int:
        self._end(0)
        code = self._process.returncode if self._process and reason == "engine_exited" else None
        self._journal.write("status", status="failed", reason=reason, exit_code=code, log_tail=self._log_tail())
        return status

    def _end(self, grace: float) -> None:
        if self._process is not None:
            processes.kill_ladder(self._process, self._token, grace)
            while not _kill_children():
                time.sleep(0.02)
        self._tidy()

    def _tidy(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(self._attempt.socket)

    def _cut(self) -> None:
        """The supervisor is gone: kill everything now, and be gone within two seconds.

        Runs in two threads, and within itself: nothing here may take a lock.
        """
        self._cutting = True
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            clean = self._process is None or processes.kill_now(self._process, self._token)
            if _kill_children() and clean:
                break
            time.sleep(0.02)
        self._tidy()
        os._exit(EXIT_LIFELINE_CUT)

    def _log_tail(self) -> str:
        with contextlib.suppress(OSError), (self._directory / "log.txt").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL))
            return file.read().decode(errors="replace")
        return ""

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._signs.put("stop")

    def _on_sighup(self, number: int, frame: FrameType | None) -> None:
        # It comes once for each thread of a supervisor that is killed.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._cut()


def _post_guard(token: str, scratch: str) -> None:
    """Forks the last net: a twin that does nothing but wait for our end, and then kills what we left alive.

    For SIGKILL of the replica itself: the engine's first process then gets its parent-death signal, but vLLM's
    EngineCore, a child of that one, lives on, and nobody would be left who knows of it.
    """
    read, write = os.pipe()
    if os.fork():
        # The writing end stays open, and only here, until we end.
        os.close(read)
        return
    try:
        os.close(write)
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.read(read, 1)
        while processes.kill_holders(token):
            time.sleep(0.05)
        shutil.rmtree(scratch, ignore_errors=True)
    finally:
        os._exit(0)


def _kill_children() -> bool:
    """SIGKILL for every child, adopted ones included; True when none is left. Their children come to us next."""
    living = processes.living_children()
    for pid in living:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for _ in _reaped():
        pass
    return not living


def _reaped() -> Iterator[int]:
    with contextlib.suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            yield pid


def main(argv: list[str]) -> int:
    """Reads the attempt and runs it."""
    directory = Path(argv[1])
    # Popped, so that nothing we start can mistake the number for a pipe of its own.
    life_fd = os.environ.pop(processes.LIFE_FD, None)
    values: dict[str, Any] = json.loads((directory / "attempt.json").read_bytes())
    attempt = Attempt(**values)
    return Replica(directory, attempt, os.environ[processes.TOKEN]).run(int(life_fd) if life_fd else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
