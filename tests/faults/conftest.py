"""A real worker process on a data directory of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.db import Database
from app.models import Job
from app.settings import Settings
from tests.support import wait_for


class WorkerProcess:
    """``python -m workers.main`` with one light slot."""

    def __init__(self, settings: Settings, broker_url: str, log: Path) -> None:
        self._log = log
        self._environment = {
            **os.environ,
            "TUNESMITH_DATA_DIR": str(settings.data_dir),
            "TUNESMITH_RUN_DIR": str(settings.run_dir),
            "TUNESMITH_DATABASE_URL": settings.database,
            "TUNESMITH_BROKER_URL": broker_url,
            "TUNESMITH_PLUGIN_PACKAGES": "tests.plugs",
            "TUNESMITH_SLOTS": "light:1",
            "TUNESMITH_HEARTBEAT_SECONDS": "0.3",
            "TUNESMITH_LEASE_SECONDS": "3",
            "TUNESMITH_GRACE_SECONDS": "10",
            "TUNESMITH_BALLAST_BYTES": "0",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **environment: str) -> "WorkerProcess":
        """Returns at once; the worker claims as soon as it is up."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-m", "workers.main"],
                env={**self._environment, **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    @property
    def pid(self) -> int:
        """Its number."""
        assert self.process is not None
        return self.process.pid

    def log(self) -> str:
        """What it said."""
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self, seconds: float = 30) -> int:
        """SIGTERM; its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@pytest.fixture
def worker(settings: Settings, valkey_url: str, tmp_path: Path) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(settings, valkey_url, tmp_path / "worker.log")
    yield worker
    if worker.process is not None and worker.process.poll() is None:
        worker.kill()


@pytest.fixture
def until(database: Database) -> Callable[..., Job]:
    """``until(id, state)``: waits for the state; the row."""

    def until(job_id: str, *states: str, seconds: float = 40) -> Job:
        def look() -> Job | None:
            with database.read() as session:
                job = session.get_one(Job, job_id)
            return job if job.state in states else None

        job = wait_for(look, seconds)
        assert job is not None
        return job

    return until
