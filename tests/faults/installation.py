"""A whole installation of real processes that can be killed, frozen, starved and healed: what the soak runs on."""

import contextlib
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis

from app.broker import embedded_command, embedded_url, wait_until_ready
from app.db import Database
from app.models import Job
from app.processes import processes_of_instance
from app.projects.bootstrap import ensure_first_key
from app.schema import upgrade
from app.settings import Settings
from app.storage import Storage
from app.up import LISTEN_FD
from tests.faults.clock import SetClock
from tests.support import make_model_folder

SLOTS = ("light:2", "train:1", "gpu:1")
LEASE = 3.0
_DISK = "256m"


class Installation:
    """A broker, an API and three workers on a data directory of its own; as root on a small file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._disk = folder / "disk"
        self._disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(self._disk)]
        self.has_own_disk = os.getuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
        self.model = make_model_folder(folder / "models" / "tiny")
        self.settings = Settings(
            data_dir=self._disk / "data",
            run_dir=folder / "run",
            model_roots=(folder / "models",),
            plugin_packages=("tests.plugs",),
            min_free_bytes=1 << 20,
            disk_reserve_bytes=4 << 20,
            ballast_bytes=4 << 20,
        )
        upgrade(self.settings)
        self.key = ensure_first_key(self.settings, lambda _: None).read_text().strip()
        self.storage = Storage(self.settings.data_dir)
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")},
            "TUNESMITH_DATA_DIR": str(self.settings.data_dir),
            "TUNESMITH_RUN_DIR": str(folder / "run"),
            "TUNESMITH_MODEL_ROOTS": str(folder / "models"),
            "TUNESMITH_PLUGIN_PACKAGES": "tests.plugs",
            "TUNESMITH_BROKER_URL": embedded_url(self.settings),
            "TUNESMITH_HEARTBEAT_SECONDS": "0.3",
            "TUNESMITH_LEASE_SECONDS": str(LEASE),
            "TUNESMITH_GRACE_SECONDS": "5",
            "TUNESMITH_MIN_FREE_BYTES": str(1 << 20),
            "TUNESMITH_DISK_RESERVE_BYTES": str(4 << 20),
            "TUNESMITH_BALLAST_BYTES": str(4 << 20),
            "TUNESMITH_WARM_RUNNERS": "0",
        }
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._log = (folder / "log").open("ab")
        have = shutil.which("cc") is not None
        self.clocks = [SetClock(folder / f"clock{number}") for number in range(len(SLOTS) + 1)] if have else []
        """Of the workers, and of the API; none without a C compiler."""
        self._broker: subprocess.Popen[bytes] | None = None
        self._api: subprocess.Popen[bytes] | None = None
        self._workers: list[subprocess.Popen[bytes] | None] = [None] * len(SLOTS)

    def __enter__(self) -> Self:
        self.heal()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in (*self._workers, self._api, self._broker):
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()
        if error is not None:
            print(self.log_tail(), file=sys.stderr)
        self._log.close()
        self._listener.close()
        if self.has_own_disk:
            subprocess.run(["umount", "-l", str(self._disk)], check=True)

    def heal(self) -> None:
        """Everything runs."""
        (self._disk / "filler").unlink(missing_ok=True)
        if self._broker is None or self._broker.poll() is not None:
            self._broker = subprocess.Popen(embedded_command(self.settings), stdout=self._log, stderr=self._log)
            wait_until_ready(embedded_url(self.settings), 20)
        if self._api is None or self._api.poll() is not None:
            fd = self._listener.fileno()
            self._api = subprocess.Popen(
                [sys.executable, "-I", "-m", "app.api"],
                env={**self._environment, **self._clock(len(SLOTS)), LISTEN_FD: str(fd)},
                pass_fds=[fd],
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
            )
        for number in range(len(SLOTS)):
            self._start_worker(number)

    def _start_worker(self, number: int) -> None:
        process = self._workers[number]
        if process is None or process.poll() is not None:
            self._workers[number] = subprocess.Popen(
                [sys.executable, "-I", "-m", "workers.main"],
                env={**self._environment, **self._clock(number), "TUNESMITH_SLOTS": SLOTS[number]},
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
            )

    def _clock(self, number: int) -> dict[str, str]:
        return self.clocks[number].environment if self.clocks else {}

    def log_tail(self, lines: int = 60) -> str:
        """The end of what the processes said."""
        self._log.flush()
        return "\n".join((self.folder / "log").read_text(errors="replace").splitlines()[-lines:])

    def error_of(self, job_id: str) -> Any:
        """Why a job failed."""
        database = Database(self.settings.database)
        with database.read() as session:
            job = session.get_one(Job, job_id)
        database.close()
        return job.error_code, job.error_detail

    # Faults: each says what it did

    def kill_worker(self, number: int) -> str:
        """kill -9, and another one in its place."""
        process = self._workers[number]
        assert process is not None
        process.kill()
        process.wait()
        self._start_worker(number)
        return SLOTS[number]

    def stop_worker(self, number: int) -> str:
        """SIGTERM, and another one in its place."""
        process = self._workers[number]
        assert process is not None
        process.terminate()
        status = process.wait(60)
        self._start_worker(number)
        return f"{SLOTS[number]}, exit status {status}"

    def freeze_worker(self, number: int, seconds: float) -> str:
        """SIGSTOP for a while, up to more than two leases."""
        process = self._workers[number]
        assert process is not None
        return self._freeze(process.pid, seconds, SLOTS[number])

    def kill_runner(self, dice: random.Random) -> str:
        """One process of an attempt."""
        found = processes_of_instance(self.settings.instance)
        if not found:
            return "none"
        pid = dice.choice(found)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return str(pid)

    def freeze_runner(self, dice: random.Random, seconds: float) -> str:
        """SIGSTOP for a while."""
        found = processes_of_instance(self.settings.instance)
        return self._freeze(dice.choice(found), seconds, "runner") if found else "none"

    def _freeze(self, pid: int, seconds: float, what: str) -> str:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(seconds)
            os.kill(pid, signal.SIGCONT)
        return f"{what} for {seconds:.1f} s"

    def kill_api(self) -> str:
        """kill -9, and another one on the same socket."""
        assert self._api is not None
        self._api.kill()
        self._api.wait()
        self.heal()
        return "back"

    def restart_api(self) -> str:
        """SIGTERM, and another one on the same socket."""
        assert self._api is not None
        self._api.terminate()
        status = self._api.wait(30)
        self.heal()
        return f"exit status {status}, back"

    def kill_broker(self) -> str:
        """kill -9; what it had on disk goes too."""
        assert self._broker is not None
        self._broker.kill()
        self._broker.wait()
        shutil.rmtree(self.settings.data_dir / "valkey" / "appendonlydir", ignore_errors=True)
        self.heal()
        return "back, empty"

    def freeze_broker(self, seconds: float) -> str:
        """It accepts, and never answers."""
        assert self._broker is not None
        return self._freeze(self._broker.pid, seconds, "broker")

    def flush_broker(self) -> str:
        """Every message and every queue is gone."""
        credentials, _, path = embedded_url(self.settings).removeprefix("redis+socket://").partition("@")
        with redis.Redis(unix_socket_path=path, password=credentials.removeprefix(":"), socket_timeout=5) as client:
            client.flushall()
        return "empty"

    def lock_database(self, seconds: float) -> str:
        """Another program holds the write lock."""
        connection = sqlite3.connect(self.settings.data_dir / "tunesmith.db", timeout=20, isolation_level=None)
        try:
            connection.execute("BEGIN EXCLUSIVE")
            time.sleep(seconds)
            connection.execute("ROLLBACK")
        finally:
            connection.close()
        return f"for {seconds:.1f} s"

    def fill_disk(self, seconds: float) -> str:
        """Not one byte is left for a while."""
        filler = self._disk / "filler"
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            for size in (1 << 20, 4 << 10, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass
        time.sleep(seconds)
        filler.unlink(missing_ok=True)
        return f"for {seconds:.1f} s"

    def set_clock(self, number: int, days: int) -> str:
        """Of one process, so many days from what it really is; until it is set again, by its successors too."""
        self.clocks[number].set(days * 86_400)
        return f"{(*SLOTS, 'API')[number]} {days:+d} d"

    def stop_everything(self) -> None:
        """In good order; what runs saves itself."""
        for process in (*self._workers, self._api):
            assert process is not None
            process.terminate()
        for process in (*self._workers, self._api):
            assert process is not None
            process.wait(60)
