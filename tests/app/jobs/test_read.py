"""Reading jobs: lists with cursors and filters, history, numbers, logs, the live stream."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db import Database
from app.jobs.stream import cursor
from app.models import Artifact, Job, Metric, new_id
from app.queue import SilentDoorbell
from app.storage import Storage
from tests.support import on_sqlite
from workers.ledger import Ledger


@pytest.fixture
def post(api: TestClient) -> Callable[..., dict[str, Any]]:
    def post(**fields: Any) -> dict[str, Any]:
        answer = api.post("/jobs", json={"type": "sleepy", **fields})
        assert answer.status_code == 201, answer.text
        job: dict[str, Any] = answer.json()
        return job

    return post


@pytest.fixture
def ledger(database: Database, storage: Storage, claim: Any) -> Callable[[], Ledger]:
    """The next job, claimed."""

    def ledger() -> Ledger:
        job = claim()
        assert job is not None
        return Ledger(database, storage, SilentDoorbell(), job, "w1")

    return ledger


def pages(api: TestClient, path: str, limit: int) -> list[str]:
    ids: list[str] = []
    after = ""
    while True:
        page = api.get(f"{path}limit={limit}{after}").json()
        assert page["object"] == "list"
        got = [row["id"] for row in page["data"]]
        assert (page["first_id"], page["last_id"]) == ((got[0], got[-1]) if got else (None, None))
        ids += got
        if not page["has_more"]:
            return ids
        assert len(got) == limit
        after = f"&after={page['last_id']}"


def test_pages_of_jobs(api: TestClient, post: Any) -> None:
    """Newest first; no row twice and none left out, whatever the size of a page, and while others are added."""
    ids = [post()["id"] for _ in range(5)][::-1]
    for limit in (1, 2, 5, 6):
        assert pages(api, "/jobs?", limit) == ids
    first = api.get("/jobs?limit=2").json()
    post()
    rest = api.get(f"/jobs?limit=10&after={first['last_id']}").json()
    assert [row["id"] for row in first["data"] + rest["data"]] == ids


def test_pages_of_rows_of_one_moment(api: TestClient, add: Any) -> None:
    from app.models import now  # noqa: PLC0415

    moment = now()
    ids = sorted((add(created_at=moment) for _ in range(5)), reverse=True)
    assert pages(api, "/jobs?", 2) == ids


def test_pages_of_files_and_artifacts(
    api: TestClient, upload: Any, database: Database, add: Callable[..., str]
) -> None:
    files = [upload().json()["id"] for _ in range(3)][::-1]
    assert pages(api, "/files?", 2) == files
    assert pages(api, "/files?purpose=fine-tune&", 2) == files
    assert pages(api, "/files?purpose=evals&", 2) == []
    job_id = add()
    with database.write() as session:
        for version, kind in enumerate(("adapter", "model", "report"), 1):
            session.add(
                Artifact(
                    id=new_id("art"),
                    project_id="proj-default",
                    job_id=job_id,
                    name="a",
                    version=version,
                    kind=kind,
                    bytes=1,
                    sha256="s",
                )
            )
            session.flush()
    page = api.get("/artifacts").json()
    assert [row["version"] for row in page["data"]] == [3, 2, 1]
    assert pages(api, "/artifacts?", 2) == [row["id"] for row in page["data"]]
    assert [row["kind"] for row in api.get("/artifacts?kind=model").json()["data"]] == ["model"]
    assert api.get("/artifacts?name=b").json()["data"] == []
    assert api.get("/artifacts?kind=cake").status_code == 400
    one = page["data"][0]
    assert api.get(f"/artifacts/{one['id']}").json() == one
    assert api.get(f"/jobs/{job_id}").json()["artifact_ids"] == [row["id"] for row in page["data"]][::-1]


def test_filters(api: TestClient, post: Any) -> None:
    red = post(metadata={"team": "red", "a b": 'quo"te'}, experiment_name="one")["id"]
    blue = post(metadata={"team": "blue"})["id"]
    api.post(f"/jobs/{blue}/cancel")

    def ids(**query: str) -> list[str]:
        answer = api.get("/jobs", params=query)
        assert answer.status_code == 200, answer.text
        return [job["id"] for job in answer.json()["data"]]

    assert ids() == [blue, red]
    assert ids(status="queued") == [red]
    assert ids(status="cancelled") == [blue]
    assert ids(status="paused") == []
    assert ids(type="sleepy") == [blue, red]
    assert ids(type="train") == []
    assert ids(experiment_name="one") == [red]
    assert ids(**{"metadata[team]": "red"}) == [red]
    assert ids(**{"metadata[team]": "red", "status": "cancelled"}) == []
    assert ids(**{"metadata[a b]": 'quo"te'}) == [red]
    for hostile in ('"', "'", "$.team", 'x" : 1}', "a.b", "[0]", "", "\\", "%", "🙂"):
        assert ids(**{f"metadata[{hostile}]": "red"}) == [], hostile


def test_the_history(api: TestClient, post: Any, ledger: Any, history: Any) -> None:
    job_id = post()["id"]
    attempt = ledger()
    attempt.beat([{"kind": "event", "code": f"e{n}", "message": "m", "level": "info", "data": {}} for n in range(5)])
    attempt.succeed({}, [])
    events = [event.id for event in history(job_id)]
    asked = api.get(f"/jobs/{job_id}/events?order=asc").json()["data"]
    assert [event["seq"] for event in asked] == list(range(1, 9))
    assert [event["id"] for event in asked] == events
    assert asked[1]["data"] == {"slot": "light-0", "from": "queued", "to": "running"}
    assert asked[2]["data"] == {}
    for limit in (1, 3, 8):
        assert pages(api, f"/jobs/{job_id}/events?", limit) == events[::-1]
        assert pages(api, f"/jobs/{job_id}/events?order=asc&", limit) == events
    by_number = api.get(f"/jobs/{job_id}/events?order=asc&after=6").json()["data"]
    assert [event["seq"] for event in by_number] == [7, 8]
    assert api.get(f"/jobs/{job_id}/events?after=ftevent-none").status_code == 404
    assert api.get(f"/jobs/{job_id}/events?after=99999999999").status_code == 404


def test_numbers_and_checkpoints(api: TestClient, post: Any, ledger: Any, storage: Storage) -> None:
    job_id = post()["id"]
    attempt = ledger()
    folder = storage.attempt_dir(job_id, 1) / "ckpt" / "checkpoint-2"
    folder.mkdir(parents=True)
    lines = [{"kind": "metric", "step": step, "values": {"loss": 1 / step, "lr": None}} for step in (1, 2, 4)]
    attempt.beat([*lines, {"kind": "checkpoint", "step": 2, "path": str(folder), "bytes": 7, "metrics": {"a": 1}}])
    expected = [{"step": step, "values": {"loss": 1 / step, "lr": None}} for step in (1, 2, 4)]
    assert api.get(f"/jobs/{job_id}/metrics").json() == expected
    assert api.get(f"/jobs/{job_id}/metrics?after_step=1").json() == expected[1:]
    (checkpoint,) = api.get(f"/jobs/{job_id}/checkpoints").json()["data"]
    assert (checkpoint["step"], checkpoint["bytes"], checkpoint["metrics"]) == (2, 7, {"a": 1})
    assert checkpoint["path"] == f"jobs/{job_id}/a1/ckpt/checkpoint-2"
    # The same step again, after starting over, takes the place of the first.
    attempt.beat([{"kind": "checkpoint", "step": 2, "path": str(folder), "bytes": 8}])
    assert [row["bytes"] for row in api.get(f"/jobs/{job_id}/checkpoints").json()["data"]] == [8]


@on_sqlite
def test_the_log(api: TestClient, post: Any, storage: Storage) -> None:
    job_id = post()["id"]
    answer = api.get(f"/jobs/{job_id}/logs")
    assert (answer.status_code, answer.text) == (200, "")
    assert answer.headers["content-type"].startswith("text/plain")
    for fence in (9, 10):
        storage.attempt_dir(job_id, fence).mkdir(parents=True)
        (storage.attempt_dir(job_id, fence) / "log.txt").write_bytes(f"attempt {fence} é".encode() + b"\xff\n")
    assert api.get(f"/jobs/{job_id}/logs").text == "attempt 10 é\ufffd\n"
    assert api.get(f"/jobs/{job_id}/logs?tail_bytes=2").text == "\ufffd\n"
    assert api.get(f"/jobs/{job_id}/logs?tail_bytes=0").status_code == 400


# The stream


def frames(text: str) -> list[tuple[str | None, str, Any]]:
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(":"))
        if "data" in fields:
            found.append((fields.get("id"), fields.get("event", "message"), json.loads(fields["data"])))
    return found


@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
def test_the_stream_of_a_finished_job_tells_all_and_ends(api: TestClient, post: Any, ledger: Any) -> None:
    job_id = post()["id"]
    attempt = ledger()
    attempt.beat(
        [
            {"kind": "phase", "phase": "training"},
            {"kind": "progress", "step": 1, "total_steps": 2, "loss": 0.5},
            {"kind": "metric", "step": 1, "values": {"loss": 0.5}},
            {"kind": "metric", "step": 2, "values": {"loss": 0.4}},
        ]
    )
    attempt.succeed({}, [])
    answer = api.get(f"/jobs/{job_id}/stream")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    got = frames(answer.text)
    assert [(id_, name) for id_, name, _ in got] == [
        ("1", "event"),
        ("2", "event"),
        ("3", "event"),
        ("m1", "metrics"),
        ("m2", "metrics"),
        (None, "progress"),
        (None, "done"),
    ]
    assert got[-1][2] == {"status": "succeeded"}
    assert got[3][2] == {"step": 1, "values": {"loss": 0.5}}
    assert got[5][2]["loss"] == 0.5

    def ids(last: str) -> list[str]:
        text = api.get(f"/jobs/{job_id}/stream", headers={"last-event-id": last}).text
        return [id_ for id_, _, _ in frames(text) if id_]

    assert ids("2") == ["3", "m1", "m2"]
    assert ids("2,m1") == ["3", "m2"]
    assert ids("nonsense") == ["1", "2", "3", "m1", "m2"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, (0, -1)),
        ("", (0, -1)),
        ("7", (7, -1)),
        ("m7", (0, 7)),
        (" 7 , m3 ", (7, 3)),
        ("-1", (0, -1)),
        ("m", (0, -1)),
        ("9" * 30, (0, -1)),
        ("²", (0, -1)),
    ],
)
def test_where_a_stream_goes_on(text: str | None, expected: tuple[int, int]) -> None:
    assert cursor(text) == expected


def test_the_stream_of_a_running_job_follows_it_to_its_end(api: TestClient, post: Any, ledger: Any) -> None:
    """Several listeners, each from where it was; all end with the job."""
    job_id = post()["id"]
    attempt = ledger()
    texts: dict[str, str] = {}

    def listen(last: str) -> None:
        texts[last] = api.get(f"/jobs/{job_id}/stream", headers={"last-event-id": last}).text

    threads = [threading.Thread(target=listen, args=(last,)) for last in ("0", "1", "2")]
    for thread in threads:
        thread.start()
    for number in range(3):
        attempt.beat([{"kind": "event", "code": f"e{number}", "message": "m", "level": "info", "data": {}}])
    attempt.succeed({}, [])
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    for last, text in texts.items():
        got = frames(text)
        assert [id_ for id_, name, _ in got if name == "event"] == [str(n) for n in range(int(last) + 1, 7)]
        assert got[-1][1:] == ("done", {"status": "succeeded"})


@on_sqlite
def test_numbers_of_an_evaluation_follow_those_of_their_step(api: TestClient, post: Any, ledger: Any) -> None:
    """They are written later; also a client that comes back in between gets them."""
    job_id = post()["id"]
    attempt = ledger()
    attempt.beat([{"kind": "metric", "step": 4, "values": {"loss": 0.5}}])
    texts: dict[str, str] = {}

    def listen(last: str) -> None:
        texts[last] = api.get(f"/jobs/{job_id}/stream", headers={"last-event-id": last}).text

    threads = [threading.Thread(target=listen, args=(last,)) for last in ("0", "m4")]
    for thread in threads:
        thread.start()
    attempt.beat([{"kind": "metric", "step": 4, "values": {"eval_loss": 0.7}}])
    attempt.beat([{"kind": "metric", "step": 5, "values": {"loss": 0.4}}])
    attempt.succeed({}, [])
    for thread in threads:
        thread.join(20)
    told = {last: [data for _, name, data in frames(text) if name == "metrics"] for last, text in texts.items()}
    whole: dict[str, float] = {}
    for step in told["0"][:-1]:
        assert step["step"] == 4
        assert not whole.keys() & step["values"].keys(), "each number once"
        whole |= step["values"]
    assert whole == {"loss": 0.5, "eval_loss": 0.7}
    assert told["m4"] == [{"step": 4, "values": {"eval_loss": 0.7}}, {"step": 5, "values": {"loss": 0.4}}]


@on_sqlite
def test_a_long_history_comes_whole(api: TestClient, post: Any, ledger: Any, database: Database) -> None:
    job_id = post()["id"]
    attempt = ledger()
    with database.write() as session:
        rows = [Metric(job_id=job_id, step=step, name=name, value=1.0) for step in range(1300) for name in "abc"]
        session.add_all(rows)
    attempt.succeed({}, [])
    got = frames(api.get(f"/jobs/{job_id}/stream").text)
    assert [id_ for id_, name, _ in got if name == "metrics"] == [f"m{step}" for step in range(1300)]
    assert all(len(data["values"]) == 3 for _, name, data in got if name == "metrics")
    assert got[-1][1] == "done"


@on_sqlite
def test_open_streams_and_lists_do_not_hold_up_a_submission(api: TestClient, post: Any, database: Database) -> None:
    """On SQLite one open read cursor would block every commit."""
    job_id = post()["id"]
    thread = threading.Thread(target=api.get, args=(f"/jobs/{job_id}/stream",))
    thread.start()
    with database.read() as session:
        session.get(Job, job_id)
    durations = []
    for _ in range(5):
        answer = api.post("/jobs", json={"type": "sleepy"})
        durations.append(answer.elapsed.total_seconds())
    api.post(f"/jobs/{job_id}/cancel")
    thread.join(20)
    assert not thread.is_alive()
    assert sorted(durations)[2] < 2
