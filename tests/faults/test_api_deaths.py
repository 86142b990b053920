"""The API process dies at the points where it moves something, and beside work of others: all or nothing, and once."""

import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from app.artifacts.garbage import MIN_AGE, Collector
from app.crashpoints import VARIABLE
from app.db import Database
from app.jobs import claims
from app.models import Deployment, File, Job
from app.processes import processes_of_instance
from app.settings import Settings
from app.storage import Storage
from tests.faults.service import ApiProcess
from tests.faults.submitter import Submitter
from tests.faults.timeline import Timeline
from tests.support import GOOD_JSONL, on_sqlite, wait_for

pytestmark = [pytest.mark.fault, on_sqlite]
Until = Callable[..., Job]
ENGINE = Path(__file__).parents[1] / "workers" / "fake_engine.py"


class Client:
    """Requests to the API process, each over a connection of its own."""

    def __init__(self, service: ApiProcess, key: str, database: Database) -> None:
        self._service, self._key, self._database = service, key, database

    def __call__(self, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self._key}"}
        return httpx.request(method, f"{self._service.url}{path}", headers=headers, timeout=60, trust_env=False, **more)

    def unanswered(self, point: str, method: str, path: str, **more: Any) -> None:
        """An API that dies at a point while it answers."""
        self._service.start(**{VARIABLE: point})
        with pytest.raises(httpx.TransportError):
            self(method, path, **more)
        assert self._service.ended() == -signal.SIGKILL

    def row(self, job_id: str) -> Job:
        with self._database.read() as session:
            return session.get_one(Job, job_id)

    def codes(self, job_id: str) -> list[str]:
        """Its history, oldest first."""
        answer = self("GET", f"/jobs/{job_id}/events", params={"order": "asc", "limit": 100})
        return [event["code"] for event in answer.json()["data"]]


@pytest.fixture
def client(service: ApiProcess, key: str, database: Database) -> Client:
    return Client(service, key, database)


def test_an_upload_that_is_killed_at_its_rename(
    client: Client, service: ApiProcess, settings: Settings, database: Database, storage: Storage, timeline: Timeline
) -> None:
    """Cases 44 and 53. No row either way; what lies there is collected after an hour, and the next upload is stored."""
    part = {"file": ("rows.jsonl", GOOD_JSONL)}

    def rows() -> list[str]:
        with database.read() as session:
            return list(session.scalars(select(File.id)))

    def files() -> set[str]:
        folder = settings.data_dir / "files"
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    left: set[str] = set()
    for point, place in (("upload.before_rename", "incoming/upload-"), ("upload.after_rename", "file-")):
        client.unanswered(point, "POST", "/files", files=part)
        assert rows() == []
        (new,) = files() - left
        assert new.startswith(place)
        timeline.say(f"killed at {point}: {new}")
        left.add(new)
    service.start()
    kept = client("POST", "/files", files=part).json()["id"]
    assert rows() == [kept]
    collector = Collector(database, storage)
    assert collector.collect(0.0) == []
    assert set(collector.collect(MIN_AGE)) == {Path(name).name for name in left}
    assert files() == {kept}
    assert storage.file_path(kept).read_bytes() == GOOD_JSONL


@pytest.mark.parametrize("point", [pytest.param("cancel.before_commit", marks=pytest.mark.long), "cancel.after_commit"])
def test_a_cancellation_whose_answer_never_came(
    point: str,
    client: Client,
    service: ApiProcess,
    worker: Any,
    api: TestClient,
    database: Database,
    until: Until,
    tmp_path: Path,
) -> None:
    """Of a running job and of a waiting one: it is cancelled or as before, and asking again ends it for good."""
    submitter = Submitter(api, tmp_path, database)
    worker.start(TUNESMITH_SLOTS="train:1")
    running = submitter.post(until=str(tmp_path / "never"))
    wait_for(lambda: submitter.started(running), 40)
    waiting = submitter.post()
    before = point.startswith("cancel.before")
    for job_id in (waiting, running):
        client.unanswered(point, "POST", f"/jobs/{job_id}/cancel")
        if before:
            time.sleep(1)  # three heartbeats
            job = client.row(job_id)
            assert job.state == ("running" if job_id == running else "queued")
            assert job.cancel_requested_at is None
        else:  # also while there is no API
            assert until(job_id, "cancelled", seconds=15).fence == (1 if job_id == running else 0)
    service.start()
    again = [client("POST", f"/jobs/{job_id}/cancel").status_code for job_id in (waiting, running)]
    assert again == ([200, 202] if before else [409, 409])
    for job_id in (running, waiting):
        until(job_id, "cancelled", seconds=15)
        assert client.codes(job_id).count("job_cancelled") == 1
    assert submitter.started(waiting) == 0
    worker.ends_well()


@pytest.mark.long
def test_a_watcher_that_dies_while_it_reaps(
    client: Client,
    service: ApiProcess,
    worker: Any,
    api: TestClient,
    database: Database,
    until: Until,
    timeline: Timeline,
) -> None:
    """Before its commit the job is still the dead worker's; after it the job waits; and it is given back once."""
    job_id = api.post("/jobs", json={"type": "sleepy"}).json()["id"]
    with database.write() as session:
        assert claims.claim(session, "dead", "light-0", ["light"]) is not None
    for point, state, fence in (("reap.before_commit", "running", 1), ("reap.after_commit", "queued", 2)):
        service.start(**{VARIABLE: point}, TUNESMITH_LEASE_SECONDS="1")
        assert service.ended() == -signal.SIGKILL
        job = client.row(job_id)
        assert (job.state, job.fence, job.attempt) == (state, fence, 1)
        timeline.say(f"killed at {point}: {state}")
    service.start(TUNESMITH_LEASE_SECONDS="1")
    worker.start()
    job = until(job_id, "succeeded")
    assert (job.attempt, job.fence) == (2, 3)
    assert client.codes(job_id).count("worker_lost") == 1


@pytest.mark.long
def test_a_watcher_that_dies_while_it_begins_a_deployment(
    client: Client, service: ApiProcess, database: Database, models: Path
) -> None:
    """Nothing of it is there afterwards, and the next one begins it, once."""
    roots = {"TUNESMITH_MODEL_ROOTS": str(models)}
    service.start(**{VARIABLE: "deploy.before_commit"}, **roots)
    body = {"type": "deploy", "model": str(models / "tiny"), "name": "tiny"}
    job_id = client("POST", "/jobs", json=body).json()["id"]
    assert service.ended() == -signal.SIGKILL

    def made() -> tuple[int, int]:
        with database.read() as session:
            replicas = select(func.count()).select_from(Job).where(Job.type == "serve")
            return session.scalar(select(func.count()).select_from(Deployment)) or 0, session.scalar(replicas) or 0

    assert (client.row(job_id).state, client.row(job_id).fence, made()) == ("queued", 0, (0, 0))
    service.start(**roots)
    wait_for(lambda: client.row(job_id).deployment_id)
    time.sleep(2)  # two more rounds
    assert (client.row(job_id).state, client.row(job_id).fence, made()) == ("running", 1, (1, 1))
    assert client.codes(job_id).count("job_started") == 1


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """What stands where a Python with vLLM is expected, and starts the engine without a model."""
    script = tmp_path / "engine"
    script.write_text(
        f"#!{sys.executable}\n"
        "import os, sys\n"
        "given = dict(word[2:].split('=', 1) for word in sys.argv if word.startswith('--') and '=' in word)\n"
        f"command = [{sys.executable!r}, {str(ENGINE)!r}, given['uds'], 'ok']\n"
        "command.append('--served=' + given['served-model-name'])\n"
        "os.execv(command[0], command)\n"
    )
    script.chmod(stat.S_IRWXU)
    return script


def test_a_run_and_a_deployment_live_through_the_death_of_the_api(
    client: Client,
    service: ApiProcess,
    worker: Any,
    database: Database,
    settings: Settings,
    until: Until,
    models: Path,
    engine: Path,
    tmp_path: Path,
    timeline: Timeline,
) -> None:
    """Case 44. Neither is touched: the same attempt, the same processes; and the model answers when the API does."""
    places = {"TUNESMITH_MODEL_ROOTS": str(models), "TUNESMITH_SERVE_PYTHON": str(engine)}
    service.start(**places)
    worker.start(TUNESMITH_SLOTS="train:1,serve:1", **places)
    tally = {"type": "tally", "file": str(tmp_path / "tally"), "until": str(tmp_path / "go")}
    run = client("POST", "/jobs", json=tally).json()["id"]
    asked = {"name": "tiny", "model": str(models / "tiny"), "parity": "off"}  # its answers are no model's
    made = client("POST", "/deployments", json=asked)
    assert made.status_code == 201, made.text
    address = f"/deployments/{made.json()['id']}"
    wait_for(lambda: client("GET", address).json()["status"] == "ready" and (tmp_path / "tally").exists(), 60)
    before = client("GET", address).json()
    pids = sorted(processes_of_instance(settings.instance))
    assert len(pids) >= 3, "a runner, a replica, its engine"

    def complete() -> httpx.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
        return client("POST", "/v1/chat/completions", json=body)

    assert complete().status_code == 200
    for end in (service.kill, lambda: (service.terminate(), service.ended())):
        end()
        assert sorted(processes_of_instance(settings.instance)) == pids
        service.start(**places)
        answers = [complete() for _ in range(5)]
        timeline.count("P15", "completions answered after a restart of the API", sum(a.is_success for a in answers), 5)
    time.sleep(settings.lease_seconds + 2)  # the new API watches, and finds nothing silent
    after = client("GET", address).json()
    assert (after["status"], after["restarts"], after["replicas"]) == ("ready", 0, before["replicas"])
    assert sorted(processes_of_instance(settings.instance)) == pids
    with database.read() as session:
        replica = session.scalars(select(Job).where(Job.type == "serve")).one()
    for job in (client.row(run), replica):
        assert (job.state, job.attempt, job.fence) == ("running", 1, 1)
    (tmp_path / "go").touch()
    job = until(run, "succeeded")
    assert (job.attempt, job.fence, len((tmp_path / "tally").read_text().splitlines())) == (1, 1, 1)
    assert client("DELETE", address).status_code == 200
    wait_for(lambda: client("GET", address).json()["status"] == "stopped")
    worker.ends_well()
