"""``tunesmith up``: the whole service in the foreground. Starts broker, worker and API, and starts again what dies."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType

from app.broker import NoBroker, embedded_command, embedded_url, last_words, only_server, wait_until_ready
from app.processes import die_with_parent
from app.projects.bootstrap import ensure_first_key
from app.running import RUN_FILE, DataDirLock
from app.schema import upgrade
from app.settings import Settings
from app.storage import write_private

LISTEN_FD = "TUNESMITH_LISTEN_FD"
BACKOFF = (0.5, 1.0, 2.0, 5.0, 10.0)
_STEADY = 60.0
_HURRY = 5.0
_PROBED = 1.0
Say = Callable[[str], None]


def _anywhere(deaths: int) -> contextlib.AbstractContextManager[tuple[int, ...]]:
    return contextlib.nullcontext(())


@dataclass
class Part:
    """One child: how to start it, and what became of it."""

    name: str
    command: list[str]
    environment: dict[str, str]
    pass_fds: tuple[int, ...] = ()
    room: Callable[[int], contextlib.AbstractContextManager[tuple[int, ...]]] = _anywhere
    """Around a start, with how often it died lately; what it yields is inherited too."""
    process: "subprocess.Popen[bytes] | None" = None
    deaths: int = 0
    started: float = 0.0
    again_at: float = field(default=0.0)

    def start(self) -> None:
        """A session of its own, so that Ctrl-C reaches only us; SIGKILL for it if we die."""
        self.started = time.monotonic()
        with self.room(self.deaths) as fds:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                pass_fds=(*self.pass_fds, *fds),
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                preexec_fn=die_with_parent,
            )

    def died(self) -> float:
        """Notes a death, or a start that failed; seconds until the next start."""
        now = time.monotonic()
        self.deaths = 0 if now - self.started > _STEADY else self.deaths
        delay = BACKOFF[min(self.deaths, len(BACKOFF) - 1)]
        self.deaths += 1
        self.process, self.again_at = None, now + delay
        return delay

    def stop(self, seconds: float) -> None:
        """SIGTERM, patience, SIGKILL."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Service:
    """The three parts and the loop that keeps them."""

    def __init__(self, settings: Settings, say: Say) -> None:
        self.settings = settings
        self._say = say
        self._signals = 0
        self._lock = DataDirLock(settings, _PROBED)  # who asks whether we are up holds it for a moment
        self._socket = _listen(settings.host, settings.port)
        self.port: int = self._socket.getsockname()[1]
        self.url = settings.model_copy(update={"port": self.port}).base_url
        self._broker_url = settings.broker_url or embedded_url(settings)
        environment = {
            **os.environ,
            "TUNESMITH_DATA_DIR": str(settings.data_dir),
            "TUNESMITH_BROKER_URL": self._broker_url,
            "TUNESMITH_PORT": str(self.port),
            "PYTHONUNBUFFERED": "1",
        }
        fd = self._socket.fileno()
        python = [sys.executable, "-I", "-m"]
        self._parts = [
            Part("worker", [*python, "workers.main"], environment),
            Part("API", [*python, "app.api"], {**environment, LISTEN_FD: str(fd)}, pass_fds=(fd,)),
        ]
        if settings.broker_url is None:
            plain = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
            self._parts.insert(0, Part("broker", embedded_command(settings), plain, room=self._broker_room))

    def run(self) -> int:
        """Blocks until SIGINT, SIGTERM or SIGHUP; leaves nothing running."""
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, self._on_signal)
        try:
            self._begin()
            while not self._signals:
                self._look_after()
                time.sleep(0.1)
        finally:
            self._end()
        return 0

    def _begin(self) -> None:
        upgrade(self.settings)
        key_file = ensure_first_key(self.settings, self._say)
        if self.settings.broker_url is not None:
            wait_until_ready(self._broker_url, 20)
        for part in self._parts:
            part.start()
            if part.name == "broker":
                self._await_broker(part)
        about = {"url": self.url, "pid": os.getpid(), "key_file": str(key_file)}
        write_private(self.settings.data_dir / RUN_FILE, json.dumps(about).encode())
        self._say(f"Tunesmith is up at {self.url} (docs at {self.url}/docs); the API key lies in {key_file}")

    def _broker_room(self, deaths: int) -> contextlib.AbstractContextManager[tuple[int, ...]]:
        return only_server(self.settings, self._say, afresh=deaths > 1)

    def _await_broker(self, part: Part) -> None:
        """A Valkey that ends at once gets a second try, without what its predecessor left. Raises NoBroker."""
        while True:
            try:
                return wait_until_ready(self._broker_url, 20, part.process)
            except NoBroker as error:
                said = f"{error}: {last_words(self.settings)}"
                if part.deaths or part.process is None or part.process.poll() is None:
                    raise NoBroker(said) from error
                self._say(f"{said}; it starts again, empty")
                part.deaths = 2
                part.start()

    def _look_after(self) -> None:
        for part in self._parts:
            process = part.process
            if process is not None and process.poll() is not None:
                delay = part.died()
                self._say(f"the {part.name} ended (status {process.returncode}); it starts again in {delay:g} s")
            elif process is None and time.monotonic() >= part.again_at:
                try:
                    part.start()
                except (NoBroker, OSError) as error:
                    delay = part.died()
                    self._say(f"the {part.name} does not start: {error}; it is tried again in {delay:g} s")

    def _end(self) -> None:
        """API first, so that nothing new comes in; then the worker with its grace; then the broker."""
        with contextlib.suppress(OSError):
            (self.settings.data_dir / RUN_FILE).unlink()
        parts = {part.name: part for part in self._parts}
        self._socket.close()
        parts["API"].stop(12)
        worker = parts["worker"]
        if worker.process is not None and worker.process.poll() is None:
            self._say(
                f"stopping; what runs gets {self.settings.grace_seconds:g} s to save itself (Ctrl-C: {_HURRY:g} s)"
            )
            worker.process.terminate()
            deadline = time.monotonic() + self.settings.grace_seconds + 15
            while worker.process.poll() is None and time.monotonic() < deadline:
                if self._signals > 1:
                    deadline = min(deadline, time.monotonic() + _HURRY)
                    self._signals = 1
                time.sleep(0.05)
            worker.stop(0.1)
        if "broker" in parts:
            parts["broker"].stop(5)
        self._lock.release()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1


def _listen(host: str, port: int) -> socket.socket:
    """The API's listening socket is ours: it stays open while the API starts again, and clients wait in its queue."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise RuntimeError(f"{host}:{port} cannot be listened on ({error.strerror}); set TUNESMITH_PORT") from error
    listener.listen(1024)
    return listener
