"""A push from the request to the commit, by a real runner and the real client; its token is seen by the hub alone."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.discovery import discover
from app.models import Artifact, Job
from app.processes import processes_of_instance
from app.settings import Settings
from tests.hub.server import HubServer
from tests.support import wait_for
from tests.workers.conftest import TOKEN
from tests.workers.supervision.conftest import Attempt, claim
from workers.child import environment
from workers.supervisor import House
from workers.warm import Spares

REPO = "acme/tiny"
Submit = Callable[..., str]


@pytest.fixture
def artifact(house: House, settings: Settings, api: TestClient, models: Path) -> str:
    """A model of a few bytes that a job could have left; the house runs our own operations."""
    object.__setattr__(house, "settings", settings)
    object.__setattr__(house, "catalog", discover(settings.packages))
    published = house.storage.publish(models / "tiny", "art-tiny", {})
    facts = {"bytes": published.bytes, "sha256": published.sha256, "project_id": "proj-default"}
    with house.database.write() as session:
        session.add(Artifact(id="art-tiny", name="tiny", version=1, kind="model", **facts))
    return "art-tiny"


@pytest.fixture
def submit(api: TestClient, artifact: str) -> Submit:
    """``submit(**fields)``: a push of that model; its job's id."""

    def submit(**fields: Any) -> str:
        answer = api.post("/jobs", json={"type": "push_to_hub", "model": "tiny", "repo_id": REPO, **fields})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    return submit


def attempts(house: House, job_id: str) -> list[Attempt]:
    """Attempts until the job has ended; pauses between them are left out."""
    made: list[Attempt] = []
    while not made or made[-1].row().state == "queued":
        made.append(claim(house))
        assert made[-1].job.id == job_id
        made[-1].end(60)
    return made


def written(house: House) -> bytes:
    """Everything that lies in the data directory, the database included."""
    return b"".join(path.read_bytes() for path in house.storage.root.rglob("*") if path.is_file())


def test_the_commit_stands_in_the_job_and_the_token_nowhere(
    hub: HubServer, submit: Submit, house: House, api: TestClient, artifact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    class Watched(subprocess.Popen[bytes]):
        def __init__(self, argv: list[str], **options: Any) -> None:
            started.append(argv)
            super().__init__(argv, **options)

    monkeypatch.setattr("workers.child.subprocess.Popen", Watched)
    job_id = submit()
    (attempt,) = attempts(house, job_id)
    job = api.get(f"/jobs/{job_id}").json()
    assert job["status"] == "succeeded", job["error"]
    repo = hub.store.repos[REPO]
    result = job["result"]
    assert result["commit"] == repo.branches["main"]
    assert result["commit_url"] == f"{hub.url}/{REPO}/commit/{result['commit']}"
    assert (repo.private, result["private"], result["changed"]) == (True, True, True)
    card = repo.commits[result["commit"]]["README.md"].data.decode()
    assert card == api.get(f"/artifacts/{artifact}/card").text
    assert job["progress"]["step"] == job["progress"]["total_steps"] == result["uploaded_bytes"]
    assert {"push_started", "job_complete"} <= set(attempt.codes())

    assert hub.store.tokens() == {f"Bearer {TOKEN}"}
    assert TOKEN.encode() not in written(house)
    assert len(started) == 1
    assert TOKEN not in str(started)
    down = api.get(f"/artifacts/{artifact}/lineage?direction=down").json()
    assert job_id in {node["id"] for node in down["nodes"]}

    again = submit()
    attempts(house, again)
    result = api.get(f"/jobs/{again}").json()["result"]
    assert (result["changed"], result["commit"]) == (False, repo.branches["main"])
    assert len(repo.commits) == 2


def test_what_the_hub_breaks_off_is_tried_again_by_the_policy(
    hub: HubServer, submit: Submit, house: House, api: TestClient, artifact: str
) -> None:
    """Twice in vain, then it goes on: the weights are not sent again."""
    hub.store.fail("POST", "/commit/", 503, times=2)
    job_id = submit()
    made = attempts(house, job_id)
    assert len(made) == 3
    assert made[-1].row().state == "succeeded"
    assert made[-1].codes().count("model_unreachable") == 2
    assert len(hub.store.asked("PUT")) == 1
    assert house.storage.verify(artifact) == []


def test_a_hub_that_stays_ill_fails_the_job_and_harms_nothing(
    hub: HubServer, submit: Submit, house: House, api: TestClient, artifact: str
) -> None:
    hub.store.fail("GET", "whoami", 502, times=99)
    job_id = submit(retry={"max_attempts": 2})
    assert len(attempts(house, job_id)) == 2
    error = api.get(f"/jobs/{job_id}").json()["error"]
    assert (error["code"], error["param"]) == ("model_unreachable", "repo_id")
    assert "2 attempts were made" in error["message"]
    assert "POST /jobs/{id}/retry" in error["hint"]
    assert house.storage.verify(artifact) == []
    hub.store.faults.clear()
    answer = api.post(f"/jobs/{job_id}/retry")
    assert answer.status_code == 201, answer.text
    assert attempts(house, answer.json()["id"])[-1].row().state == "succeeded"


def test_what_the_hub_forbids_is_not_tried_again(
    hub: HubServer, submit: Submit, house: House, api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "another" * 5)
    job_id = submit()
    assert len(attempts(house, job_id)) == 1
    job = api.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["error"]["code"], job["error"]["param"]) == ("failed", "hub_refused", "repo_id")
    assert "HF_TOKEN" in job["error"]["hint"]
    assert b"hf_another" not in written(house)


def test_a_warm_runner_is_told_the_token_when_it_is_taken(
    hub: HubServer, submit: Submit, house: House, api: TestClient, artifact: str
) -> None:
    """A spare waits without it; what the environment of its start shows never changes."""
    spares = Spares(house.settings.instance, environment(house.settings, None), 1)
    object.__setattr__(house, "spares", spares)
    spares.start()
    try:
        wait_for(lambda: spares.ready() == 1, 90)
        (waiting,) = processes_of_instance(house.settings.instance)
        assert TOKEN.encode() not in Path(f"/proc/{waiting}/environ").read_bytes()
        job_id = submit()
        (attempt,) = attempts(house, job_id)
        assert attempt.row().state == "succeeded", attempt.row().error_detail
    finally:
        spares.stop()
    assert hub.store.tokens() == {f"Bearer {TOKEN}"}
    assert TOKEN.encode() not in written(house)


def test_a_push_that_is_cancelled_ends_at_once(hub: HubServer, submit: Submit, house: House, api: TestClient) -> None:
    hub.store.fail("PUT", "/lfs/", 503, times=99)  # the client tries for half a minute
    job_id = submit()
    attempt = claim(house)
    wait_for(lambda: hub.store.asked("PUT"))
    api.post(f"/jobs/{job_id}/cancel")
    row: Job = attempt.end(20)
    assert row.state == "cancelled"
    assert len(hub.store.repos[REPO].commits) == 1
