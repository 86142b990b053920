"""The API process is killed, stopped and crowded; what it answered with 201 is there, and nothing is there twice."""

import asyncio
import json
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import aiohttp
import httpx
import psutil
import pytest
from sqlalchemy import func, select

from app.db import Database
from app.models import File, Job
from app.settings import Settings
from tests.faults.service import ApiProcess
from tests.faults.timeline import Timeline
from tests.support import GOOD_JSONL, on_sqlite, wait_for

pytestmark = [pytest.mark.fault, on_sqlite]
SLEEPY = {"type": "sleepy"}


@pytest.fixture
def headers(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}", "content-type": "application/json"}


def post(service: ApiProcess, headers: dict[str, str], **more: str) -> httpx.Response:
    return httpx.post(f"{service.url}/jobs", json=SLEEPY, headers={**headers, **more}, timeout=60, trust_env=False)


def jobs(database: Database) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(Job)) or 0


def test_an_answer_that_never_came_is_given_again(
    service: ApiProcess, headers: dict[str, str], database: Database, timeline: Timeline
) -> None:
    """Case 35. kill -9 before the commit: no row. After it: the row, and the same key finds it."""
    for point, rows in (("submit.before_commit", 0), ("submit.after_commit", 1)):
        service.start(TUNESMITH_CRASHPOINT=point)
        with pytest.raises(httpx.TransportError):
            post(service, headers, **{"idempotency-key": "once"})
        assert service.ended() == -9
        assert jobs(database) == rows
        timeline.say(f"killed at {point}: {rows} rows")
    service.start()
    answers = [post(service, headers, **{"idempotency-key": "once"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 201]
    timeline.count("P14", "one row after a kill between commit and answer", jobs(database), 1)
    assert answers[0].json() == answers[1].json()
    other = httpx.post(
        f"{service.url}/jobs",
        json={**SLEEPY, "experiment_name": "other"},
        headers={**headers, "idempotency-key": "once"},
        trust_env=False,
    )
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")


# A crowd


async def crowd(
    url: str, headers: dict[str, str], bodies: list[bytes], connections: int
) -> list[tuple[int, Any, float]]:
    """Status, answer and seconds of each."""
    connector = aiohttp.TCPConnector(limit=connections)
    async with aiohttp.ClientSession(base_url=url, headers=headers, connector=connector) as client:
        gate = asyncio.Semaphore(connections)

        async def one(body: bytes) -> tuple[int, Any, float]:
            async with gate:
                begun = time.monotonic()
                async with client.post("/jobs", data=body) as answer:
                    said = await answer.json()
                return answer.status, said, time.monotonic() - begun

        return list(await asyncio.gather(*(one(body) for body in bodies)))


def test_a_hundred_clients_repeat_one_request(
    service: ApiProcess, headers: dict[str, str], database: Database, timeline: Timeline
) -> None:
    """Case 36. One row, a hundred equal answers."""
    service.start()
    same = {**headers, "idempotency-key": "same"}
    answers = asyncio.run(crowd(service.url, same, [json.dumps(SLEEPY).encode()] * 100, 100))
    assert {status for status, _, _ in answers} == {201}
    # The reconciler says meanwhile that there is no worker: of the job itself all say the same.
    for _, said, _ in answers:
        del said["hold_reason"], said["queue_position"]
    timeline.count("P14", "equal answers", sum(said == answers[0][1] for _, said, _ in answers), 100)
    assert jobs(database) == 1


@pytest.mark.parametrize("requests", [150, pytest.param(1000, marks=pytest.mark.long)])
def test_many_submissions_at_once(
    service: ApiProcess, headers: dict[str, str], database: Database, timeline: Timeline, requests: int
) -> None:
    """Case 37. Fifty connections on SQLite: every one is stored, no 5xx."""
    service.start()
    bodies = [json.dumps({**SLEEPY, "experiment_name": f"n{number}"}).encode() for number in range(requests)]
    answers = asyncio.run(crowd(service.url, headers, bodies, 50))
    timeline.count("P1", "POSTs over 50 connections answered 201", sum(code == 201 for code, _, _ in answers), requests)
    timeline.count("P1", "rows of them", jobs(database), requests)
    timeline.bound("P1", "slowest of them", max(seconds for _, _, seconds in answers), 10)


# The end of the process


def in_flight(service: ApiProcess) -> int:
    """Connections that it has accepted."""
    found = psutil.Process(service.pid).net_connections(kind="inet")
    return sum(connection.status == psutil.CONN_ESTABLISHED for connection in found)


@pytest.mark.parametrize("released", [True, pytest.param(False, marks=pytest.mark.long)])
def test_sigterm_with_fifty_requests_in_flight(
    service: ApiProcess,
    headers: dict[str, str],
    settings: Settings,
    database: Database,
    timeline: Timeline,
    released: bool,
) -> None:
    """Case 45. They wait for the database: it answers them all when it can, and refuses them when it cannot."""
    service.start()
    answers: list[httpx.Response | httpx.TransportError] = []

    def send() -> None:
        try:
            answers.append(post(service, headers))
        except httpx.TransportError as error:
            answers.append(error)

    threads = [threading.Thread(target=send) for _ in range(50)]
    with closing(sqlite3.connect(settings.data_dir / "tunesmith.db", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        for thread in threads:
            thread.start()
        wait_for(lambda: in_flight(service) >= 50)
        with timeline.within("P10", "SIGTERM with 50 requests in flight → the API is gone", 10):
            service.terminate()
            if released:
                holder.execute("ROLLBACK")
            status = service.ended()
        for thread in threads:
            thread.join(20)
    good = [answer for answer in answers if isinstance(answer, httpx.Response) and answer.status_code == 201]
    clean = [answer for answer in answers if isinstance(answer, httpx.TransportError) or answer.status_code == 503]
    timeline.say(f"{len(good)} answered 201, {len(clean)} refused, exit status {status}")
    assert len(good) + len(clean) == 50
    assert not released or len(good) == 50
    assert jobs(database) == len(good)
    assert status == 0


def read_stream(url: str, headers: dict[str, str], heard: list[str], ends: list[str]) -> None:
    """Lines of a stream until it ends, and how it ended."""
    try:
        with httpx.stream("GET", url, headers=headers, timeout=60, trust_env=False) as answer:
            for line in answer.iter_lines():
                heard.append(line)
        ends.append("closed")
    except httpx.TransportError as error:
        ends.append(type(error).__name__)


@pytest.mark.parametrize("how", [pytest.param("stop", marks=pytest.mark.long), "kill"])
def test_a_restart_during_a_stream_an_upload_and_a_submission(
    service: ApiProcess, headers: dict[str, str], database: Database, settings: Settings, timeline: Timeline, how: str
) -> None:
    """Case 44. The stream goes on after its last event; an upload is stored whole or not at all; a POST only waits."""
    service.start()
    job_id = post(service, headers).json()["id"]
    heard: list[str] = []
    ends: list[str] = []
    address = f"{service.url}/jobs/{job_id}/stream"
    stream = threading.Thread(target=read_stream, args=(address, headers, heard, ends))
    stream.start()
    wait_for(lambda: "id: 1" in heard)
    half, rest = threading.Event(), threading.Event()

    def slow_body() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + GOOD_JSONL
        half.set()
        rest.wait(30)
        yield b"\r\n--x--\r\n"

    uploads: list[int | None] = []

    def upload() -> None:
        form = {**headers, "content-type": "multipart/form-data; boundary=x"}
        try:
            answer = httpx.post(f"{service.url}/files", content=slow_body(), headers=form, timeout=60, trust_env=False)
            uploads.append(answer.status_code)
        except httpx.TransportError:
            uploads.append(None)

    uploading = threading.Thread(target=upload)
    uploading.start()
    assert half.wait(20)
    wait_for(lambda: in_flight(service) >= 2)
    with timeline.within("P10", f"{how} of an API with a stream and an upload → it is gone", 10):
        if how == "stop":
            service.terminate()
            stream.join(5)
            assert ends == ["closed"]
            rest.set()
            assert service.ended() == 0
        else:
            service.kill()
            rest.set()
    late: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: late.append(post(service, headers)))
    waiting.start()
    service.start()
    for thread in (stream, uploading, waiting):
        thread.join(30)
    assert late[0].status_code == 201
    assert uploads == ([201] if how == "stop" else [None])
    with database.read() as session:
        stored = [row.id for row in session.scalars(select(File))]
    assert len(stored) == (how == "stop")
    assert [path.name for path in settings.data_dir.glob("files/**/*") if path.is_file()] == stored
    last = max(int(number) for number in numbers(heard))
    again: list[str] = []
    known = {**headers, "last-event-id": str(last)}
    resumed = threading.Thread(target=read_stream, args=(address, known, again, ends))
    resumed.start()
    httpx.post(f"{address.removesuffix('/stream')}/cancel", headers=headers, timeout=60, trust_env=False)
    resumed.join(30)
    assert numbers(again) == list(range(last + 1, last + 1 + len(numbers(again))))
    assert "event: done" in again


def numbers(lines: list[str]) -> list[int]:
    """Of the events in a stream."""
    return [int(line.partition(" ")[2]) for line in lines if re.fullmatch(r"id: \d+", line)]
