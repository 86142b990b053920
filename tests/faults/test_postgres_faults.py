"""Postgres breaks off every connection, stops for a while, finds deadlocks and conflicts: each is tried again."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, make_url, select

from app.db import Database
from app.models import Artifact, Job
from tests.conftest import Cluster
from tests.faults.submitter import Submitter
from tests.faults.timeline import Timeline
from tests.support import wait_for

pytestmark = pytest.mark.fault
Until = Callable[..., Job]
LEASE = 3.0  # of the worker process
ROUNDS = 5
CONFLICT = """
CREATE SEQUENCE trouble;
CREATE FUNCTION trouble() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    -- A sequence is not rolled back, so it counts what failed, too.
    IF nextval('trouble') <= {times} THEN RAISE EXCEPTION 'trouble' USING ERRCODE = '{code}'; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER trouble BEFORE {event} ON job FOR EACH ROW EXECUTE FUNCTION trouble();
"""


@pytest.fixture(params=["postgres", pytest.param("postgres-tcp", marks=pytest.mark.long)])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def name(database_url: str) -> str:
    return str(make_url(database_url).database)


@pytest.fixture
def other(database_url: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection to the test's database that is none of ours."""
    url = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def submitter(api: TestClient, tmp_path: Path, database: Database) -> Submitter:
    return Submitter(api, tmp_path, database)


def artifacts(database: Database) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(Artifact)) or 0


def test_every_connection_is_broken_off(
    worker: Any,
    submitter: Submitter,
    until: Until,
    cluster: Cluster,
    name: str,
    tmp_path: Path,
    database: Database,
    timeline: Timeline,
) -> None:
    """Case 43. Again and again while a run is watched and work comes in: nothing is lost and nothing runs twice."""
    worker.start(TUNESMITH_SLOTS="train:2")
    running = submitter.post(until=str(tmp_path / "go"))
    wait_for(lambda: submitter.started(running), 40)
    accepted = []
    for _ in range(ROUNDS):
        broken = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        cluster.execute(broken)
        # The pool asks each connection whether it lives before it gives it away.
        accepted.append(submitter.post())
        time.sleep(0.2)
    (tmp_path / "go").touch()
    for job_id in (running, *accepted):
        job = until(job_id, "succeeded", seconds=60)
        assert (job.attempt, job.fence, submitter.started(job_id)) == (1, 1, 1)
    timeline.count("P1", "POSTs between broken connections that ran exactly once", len(accepted), ROUNDS)
    assert artifacts(database) == ROUNDS + 1


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """SIGSTOP of a server and all its processes, as a machine that is moved or fails over."""
    postmaster = psutil.Process(pid).parent()
    assert postmaster is not None
    family = [postmaster, *postmaster.children(recursive=True)]
    for process in family:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("backend", ["postgres"])
@pytest.mark.parametrize("connected", [True, False], ids=["connected", "new"])
@pytest.mark.parametrize("seconds", [2 * LEASE, pytest.param(20.0, marks=pytest.mark.long)])
def test_a_server_that_pauses(
    worker: Any,
    submitter: Submitter,
    api: TestClient,
    until: Until,
    other: psycopg.Connection[Any],
    tmp_path: Path,
    timeline: Timeline,
    seconds: float,
    connected: bool,
) -> None:
    """Case 43. For longer than a lease: the run goes on, nobody reaps it afterwards, a POST waits and is stored.

    Over a connection that is open, or over one that is still to be made.
    """
    worker.start(TUNESMITH_SLOTS="train:1")
    job_id = submitter.post(until=str(tmp_path / "go"))
    wait_for(lambda: submitter.started(job_id), 40)
    answers: list[str] = []
    how = "over an open connection" if connected else "over a new connection"
    posting = threading.Thread(target=lambda: answers.append(submitter.post()))
    with stopped(other.info.backend_pid):
        if not connected:
            api.app.state.rooms.database.engine.dispose()
        posting.start()
        time.sleep(seconds)
        assert worker.process.poll() is None
    with timeline.within("P1", f"POST {how} in a pause of the server → 201 ({seconds:g} s of pause left out)", 10):
        posting.join(30)
    assert len(answers) == 1
    time.sleep(LEASE + 1)
    job = until(job_id, "running")
    assert (job.attempt, job.fence) == (1, 1)
    (tmp_path / "go").touch()
    for accepted in (job_id, *answers):
        assert until(accepted, "succeeded").fence == 1
        assert submitter.started(accepted) == 1


def test_a_deadlock(
    worker: Any,
    submitter: Submitter,
    until: Until,
    other: psycopg.Connection[Any],
    name: str,
    tmp_path: Path,
    database: Database,
    timeline: Timeline,
) -> None:
    """Case 43. A real one: the end of a run waits for its slot's row, whose holder waits for the job's."""
    # The worker looks for deadlocks long before the one who is to win.
    other.execute(f"ALTER DATABASE {name} SET deadlock_timeout = '3s'".encode())
    worker.start(TUNESMITH_SLOTS="train:1")
    job_id = submitter.post(until=str(tmp_path / "go"))
    wait_for(lambda: submitter.started(job_id), 40)
    waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = %s"
    with other.transaction():
        other.execute("SET LOCAL deadlock_timeout = '60s'")
        other.execute("SELECT 1 FROM slot WHERE job_id = %s FOR UPDATE", [job_id])
        (tmp_path / "go").touch()
        watcher = psycopg.connect(other.info.dsn, autocommit=True, password=other.info.password or None)
        with watcher:
            wait_for(lambda: watcher.execute(waits, [name]).fetchone() != (0,), 30)
        other.execute("UPDATE job SET priority = priority WHERE id = %s", [job_id])
    job = until(job_id, "succeeded")
    assert (job.attempt, job.fence, submitter.started(job_id)) == (1, 1, 1)
    wait_for(lambda: other.execute(deadlocks, [name]).fetchone() != (0,), 10)
    timeline.say(f"deadlocks that the server found: {other.execute(deadlocks, [name]).fetchone()[0]}")  # type: ignore[index]
    assert artifacts(database) == 1


@pytest.mark.parametrize(
    "code", ["40001", pytest.param("40P01", marks=pytest.mark.long)], ids=["serialization_failure", "deadlock_detected"]
)
def test_statements_that_fail_for_now(
    worker: Any,
    submitter: Submitter,
    until: Until,
    other: psycopg.Connection[Any],
    database: Database,
    timeline: Timeline,
    code: str,
) -> None:
    """Case 43. Claims and ends of runs are tried again by themselves; a POST that failed says when to come again."""
    event = "UPDATE OF state"
    other.execute(CONFLICT.format(times=3, code=code, event=event).encode())
    job_id = submitter.post()
    worker.start(TUNESMITH_SLOTS="train:1")
    job = until(job_id, "succeeded", seconds=60)
    assert (job.attempt, job.fence, submitter.started(job_id)) == (1, 1, 1)
    assert artifacts(database) == 1
    tried = other.execute("SELECT last_value FROM trouble").fetchone()
    timeline.say(f"moves that were tried for one job: {tried}")
    other.execute(b"DROP SEQUENCE trouble; DROP FUNCTION trouble CASCADE")
    other.execute(CONFLICT.format(times=1, code=code, event="INSERT").encode())
    again = {"headers": {"idempotency-key": "k"}, "json": {"type": "sleepy"}}
    refused = submitter.client.post("/jobs", **again)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "database_busy")
    assert int(refused.headers["retry-after"]) > 0
    assert submitter.client.post("/jobs", **again).status_code == 201


@pytest.mark.parametrize(
    "level",
    [pytest.param("repeatable read", marks=pytest.mark.long), pytest.param("serializable", marks=pytest.mark.long)],
)
def test_a_server_whose_operator_wants_another_isolation(
    worker: Any, submitter: Submitter, until: Until, cluster: Cluster, name: str, level: str, timeline: Timeline
) -> None:
    """Case 43. Our guards are written for READ COMMITTED, whatever a database's default is: no conflict reaches us."""
    cluster.execute(f"ALTER DATABASE {name} SET default_transaction_isolation TO '{level}'")
    cluster.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    worker.start(TUNESMITH_SLOTS="train:1")
    accepted: list[str] = []
    threads = [threading.Thread(target=lambda: accepted.append(submitter.post())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    timeline.count("P1", f"POSTs at once answered 201 although the default is {level}", len(accepted), 8)
    for job_id in accepted[:2]:
        job = until(job_id, "succeeded", seconds=60)
        assert (job.fence, submitter.started(job_id)) == (1, 1)
