"""A service for as long as a command needs it: the one of DATA_DIR that is up, else one that ends with the command."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from app.client import Client, ServiceError
from app.commands.show import err, fail
from app.processes import die_with_parent
from app.running import AlreadyUp, DataDirLock, running_service
from app.settings import Settings

_START_SECONDS = 60
_MARGIN_SECONDS = 30


@contextmanager
def service_for(paths: Iterable[Path] = ()) -> Iterator[Client]:
    """A client of the service that is up, else of one that lives as long as the block.

    ``paths``: what our own service may read beside the folders that the operator named. Errors become messages.
    """
    settings = Settings()
    try:
        if settings.url or running_service(settings) is not None:
            with Client.find(settings) as client:
                yield client
            return
        err.print("no service is up; one is started for this command", style="dim")
        with told_to_stop(), started(settings, paths, settings.data_dir / "embedded.log") as client:
            yield client
    except ServiceError as error:
        fail(error.message, error.hint)


@contextmanager
def started(settings: Settings, roots: Iterable[Path], log_path: Path) -> Iterator[Client]:
    """``tunesmith up`` as a child that ends with the block, and at the latest with us."""
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "TUNESMITH_DATA_DIR": str(settings.data_dir),
        "TUNESMITH_MODEL_ROOTS": os.pathsep.join(dict.fromkeys(map(str, (*settings.model_roots, *roots)))),
        "TUNESMITH_PORT": os.environ.get("TUNESMITH_PORT", "0"),
    }
    with open(log_path, "wb", opener=private) as log:
        # Ctrl-C reaches only us: the service is needed for tidying up.
        process = subprocess.Popen(
            [sys.executable, "-I", "-m", "app.cli", "up"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    try:
        with _ready(settings, process, log_path) as client:
            client.embedded = process.poll() is None
            yield client
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(settings.grace_seconds + _MARGIN_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready(settings: Settings, process: "subprocess.Popen[bytes]", log: Path) -> Client:
    """Waits for a service with a worker. Another command may have been faster: then its service is taken."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        lost = process.poll() is not None and not _held(settings)
        if running_service(settings) is not None:
            client = Client.find(settings)
            if _takes_work(client):
                return client
            client.close()
        elif lost:
            break
        time.sleep(0.1)
    return fail("the service did not come up", f"Its log ends:\n{log.read_text(errors='replace')[-3000:]}")


def _held(settings: Settings) -> bool:
    try:
        DataDirLock(settings).release()
    except AlreadyUp:
        return True
    return False


def _takes_work(client: Client) -> bool:
    try:
        state = client.call("GET", "/readyz")
    except ServiceError:
        return False
    return bool(state["ready"]) and "no worker" not in state["degraded"]


def private(path: str, flags: int) -> int:
    """Opens a log that only we can read: it holds the first key."""
    fd = os.open(path, flags, 0o600)
    os.fchmod(fd, 0o600)  # it may be there from an earlier time
    return fd


@contextmanager
def told_to_stop() -> Iterator[None]:
    """SIGTERM and SIGHUP leave the block as SystemExit, once; what is told again does not disturb the tidying up."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    caught = [number for number, handler in before.items() if handler is not signal.SIG_IGN]

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        for one in caught:
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in caught:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number])
