"""Accepted means stored (P1): whatever dies after a 201, the row is there."""

import contextlib
import os
import random
import re
import shutil
import signal
import threading
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.db import Database
from app.main import create_app
from app.models import Job
from app.settings import Settings
from tests.e2e.test_up import Up
from tests.faults import oracle
from tests.faults.service import ApiProcess
from tests.faults.timeline import Timeline
from tests.support import on_sqlite, wait_for

pytestmark = pytest.mark.fault


@on_sqlite
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_rows_are_on_the_disk_before_the_answer_leaves(
    service: ApiProcess, key: str, settings: Settings, tmp_path: Path, timeline: Timeline
) -> None:
    """P1. What kill -9 does not test: each file of the database is synced after its last write, before the 201."""
    trace = tmp_path / "trace"
    calls = "fsync,fdatasync,pwrite64,ftruncate,write,writev,sendto,sendmsg"
    service.start(["strace", "-f", "-y", "-s", "64", "-o", str(trace), "-e", f"trace={calls}"])
    headers = {"authorization": f"Bearer {key}"}
    answer = httpx.post(f"{service.url}/jobs", json={"type": "sleepy"}, headers=headers, timeout=60, trust_env=False)
    assert answer.status_code == 201
    wait_for(lambda: "201 Created" in trace.read_text(errors="replace"))
    lines = trace.read_text(errors="replace").splitlines()
    answered = next(number for number, line in enumerate(lines) if "201 Created" in line)
    written: dict[str, int] = {}
    synced: dict[str, int] = {}
    for number, line in enumerate(lines[:answered]):
        call = re.match(r"\d+\s+(\w+)\(\d+<([^>]*tunesmith\.db[^>]*)>", line)
        if call:
            (synced if call[1] in ("fsync", "fdatasync") else written)[call[2]] = number
    assert str(settings.data_dir / "tunesmith.db") in written
    timeline.count(
        "P1",
        "files of the database synced between their last write and the 201",
        sum(synced.get(file, -1) > last for file, last in written.items()),
        len(written),
    )


def stream_of_posts(url: str, key: str, stored: list[str], enough: int) -> None:
    """Until nobody answers any more. What was answered with 201 is in ``stored``."""
    # No slot of this installation takes it, so the machine is busy with nothing but submissions.
    body = {"type": "validate", "model": "hub:a/b", "experiment_name": "stream"}
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, trust_env=False) as client:
        while len(stored) < 100 * enough:
            try:
                answer = client.post("/jobs", json=body)
            except httpx.TransportError:
                return
            assert answer.status_code in (201, 503), answer.text
            if answer.status_code == 201:
                stored.append(answer.json()["id"])


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=pytest.mark.long)])
def test_what_was_acknowledged_survives_the_death_of_everything(
    tmp_path: Path, run_dir: Path, timeline: Timeline, rounds: int
) -> None:
    """P1. kill -9 of every process of the service in the middle of a stream of POSTs, again and again."""
    dice = random.Random(rounds)
    up = Up(tmp_path, run_dir)
    key = (up.data_dir / "api_key").read_text().strip()
    acknowledged: list[str] = []
    for number in range(rounds):
        if number:
            up.start()
        stored: list[str] = []
        enough = dice.randint(20, 40)
        lanes = [threading.Thread(target=stream_of_posts, args=(up.url, key, stored, enough)) for _ in range(4)]
        for lane in lanes:
            lane.start()
        wait_for(lambda stored=stored, enough=enough: len(stored) >= enough, 60)  # type: ignore[misc]
        everybody = sorted(up.everybody())
        dice.shuffle(everybody)
        for pid in everybody:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for lane in lanes:
            lane.join(60)
        up.process.wait(10)
        wait_for(lambda: not up.everybody(), 15)
        acknowledged += stored
        timeline.say(f"round {number + 1}: {len(everybody)} processes killed after {len(stored)} acknowledged rows")
    settings = Settings(data_dir=up.data_dir)
    database = Database(settings.database)
    with database.read() as session:
        there = set(session.scalars(select(Job.id)))
    timeline.count("P1", "acknowledged rows still there", len(there & set(acknowledged)), len(acknowledged))
    assert len(acknowledged) >= 20 * rounds
    with TestClient(create_app(settings), headers={"authorization": f"Bearer {key}"}) as client:
        oracle.check(settings, database, client, [key.split("_", 2)[2]])
    database.close()
