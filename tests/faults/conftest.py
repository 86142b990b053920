"""A real worker process on a data directory of its own."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.db import Database
from app.main import create_app
from app.models import Job, JobEvent
from app.queue import Doorbell, SilentDoorbell
from app.settings import Settings
from tests.faults import oracle
from tests.faults.proxy import Proxy
from tests.faults.service import ApiProcess
from tests.faults.submitter import Submitter
from tests.faults.timeline import MEASURED, Timeline
from tests.faults.valkey import Valkey
from tests.support import wait_for
from tests.workers.supervision.conftest import house, start  # noqa: F401  # attempts without a worker process


def freeze(settings: Settings, *pids: int) -> None:
    """SIGSTOP, to none of them with the database in its hands: of SQLite that would stop everybody."""
    with contextlib.ExitStack() as stack:
        if settings.database.startswith("sqlite"):
            path = settings.database.removeprefix("sqlite:///")
            other = stack.enter_context(contextlib.closing(sqlite3.connect(path, timeout=30)))
            other.execute("BEGIN EXCLUSIVE")
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)


class WorkerProcess:
    """``python -m workers.main`` with one light slot."""

    command: tuple[str, ...] = (sys.executable, "-I", "-m", "workers.main")

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
            "TUNESMITH_WARM_RUNNERS": "0",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **environment: str) -> "WorkerProcess":
        """Returns at once; the worker claims as soon as it is up."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
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

    def ends_well(self, *secrets: str) -> None:
        """It lives, it stops when it is asked to, and it told its log no secret."""
        assert self.process is not None
        assert self.process.poll() is None
        assert self.stop() == 0
        assert not any(secret in self.log() for secret in secrets)


@pytest.fixture
def worker(settings: Settings, valkey_url: str, tmp_path: Path, after_the_fault: None) -> Iterator[WorkerProcess]:
    """A worker process, not started yet. When the test is over it is killed, and oracle O is asked."""
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

        try:
            job = wait_for(look, seconds)
        except AssertionError as error:
            with database.read() as session:
                events = session.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)).all()
            history = "\n".join(f"{event.created_at} {event.code} {event.message}" for event in events)
            raise AssertionError(f"{job_id} is not {' or '.join(states)}: {error}\n{history}") from None
        assert job is not None
        return job

    return until


@pytest.fixture
def timeline(request: pytest.FixtureRequest) -> Iterator[Timeline]:
    """What happened when: printed when the test ends."""
    wanted = request.config.getoption(MEASURED)
    timeline = Timeline(request.node.nodeid, Path(wanted) if wanted else None)
    yield timeline
    print("\n".join(["", timeline.test, *timeline.lines]))


@pytest.fixture
def after_the_fault(settings: Settings, database: Database, key: str) -> Iterator[None]:
    """Oracle O when the test is over and its worker is gone: ask for it before ``worker``."""
    yield
    with TestClient(create_app(settings, SilentDoorbell()), headers={"authorization": f"Bearer {key}"}) as client:
        oracle.check(settings, database, client, [key.split("_", 2)[2]])


@pytest.fixture
def service(settings: Settings, tmp_path: Path, after_the_fault: None) -> Iterator[ApiProcess]:
    """An API process, not started yet."""
    service = ApiProcess(settings, tmp_path / "api.log")
    yield service
    service.close()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Valkey]:
    """A broker of this test alone."""
    with tempfile.TemporaryDirectory(prefix="ts-b-") as run_dir:
        broker = Valkey(tmp_path / "broker", Path(run_dir)).start()
        yield broker
        broker.stop()


@pytest.fixture
def proxy(broker: Valkey) -> Iterator[Proxy]:
    """Between the broker and whoever uses ``proxy_url``."""
    proxy = Proxy(broker.socket)
    yield proxy
    proxy.close()


@pytest.fixture
def proxy_url(broker: Valkey, proxy: Proxy) -> str:
    """The broker's address by way of the proxy."""
    return f"redis://:{broker.password}@127.0.0.1:{proxy.port}/0"


@pytest.fixture
def api_on(settings: Settings, key: str, database: Database, tmp_path: Path) -> Iterator[Callable[[str], Submitter]]:
    """``api_on(broker_url)``: the API with a doorbell of its own."""
    with contextlib.ExitStack() as stack:

        def api_on(url: str) -> Submitter:
            client = TestClient(create_app(settings, Doorbell(url)), headers={"authorization": f"Bearer {key}"})
            return Submitter(stack.enter_context(client), tmp_path, database)

        yield api_on


@pytest.fixture
def once(until: Callable[..., Job]) -> Callable[..., None]:
    """``once(api, *jobs)``: each succeeds at its first and only start."""

    def once(api: Submitter, *jobs: str, seconds: float = 60) -> None:
        for job_id in jobs:
            job = until(job_id, "succeeded", seconds=seconds)
            assert (job.attempt, job.fence, api.started(job_id)) == (1, 1, 1)

    return once
