"""The worker's side of a claimed job, one word after the other, on every database."""

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from app.db import Database
from app.errors import Code, RunError
from app.models import Alias, Artifact, Job, Metric, Slot, new_id, now
from app.states import JobState
from app.storage import Published
from tests.support import on_sqlite
from workers.journal import Tail
from workers.ledger import Crash, Finished

Claim = Callable[..., Job | None]
Add = Callable[..., str]
Row = Callable[[str], Job]
QUEUED, RUNNING = JobState.QUEUED, JobState.RUNNING


def test_a_heartbeat_counts_and_stores(add: Add, claim: Claim, ledger: Any, row: Row, database: Database) -> None:
    job_id = add(resolved_spec={"model": {"dtype": None}, "adapter": "artifact:art-1"})
    attempt = ledger(claim())
    lines = [
        {"kind": "phase", "phase": "training"},
        {"kind": "progress", "step": 3, "total_steps": 10, "loss": 0.5, "t": 1.0},
        {"kind": "metric", "step": 3, "values": {"loss": 0.5, "lr": None, "word": "x"}},
        {"kind": "metric", "step": 3, "values": {"loss": 0.4}},
        {"kind": "resolved", "path": "model.dtype", "value": "float32"},
        {"kind": "resolved", "path": "adapter.dtype", "value": "a text must stay a text"},
        {"kind": "event", "code": "hello", "message": "Hi.", "level": "loud", "data": [1]},
        {"kind": "nonsense"},
    ]
    flags = attempt.beat(lines)
    assert (flags.lost, flags.cancel, flags.pause) == (False, False, False)
    job = row(job_id)
    assert job.hb_seq > 1
    assert (job.phase, job.progress) == ("training", {"step": 3, "total_steps": 10, "loss": 0.5})
    assert job.resolved_spec == {"model": {"dtype": "float32"}, "adapter": "artifact:art-1"}
    with database.read() as session:
        metrics = {(row.step, row.name): row.value for row in session.scalars(select(Metric))}
    assert metrics == {(3, "loss"): 0.4, (3, "lr"): None}
    attempt.beat([{"kind": "metric", "step": 3, "values": {"loss": 0.3}}])
    with database.read() as session:
        assert session.get_one(Metric, (job_id, 3, "loss")).value == 0.3


NONSENSE: list[dict[str, Any]] = [
    {"kind": "checkpoint"},
    {"kind": "checkpoint", "step": "x", "path": "/", "bytes": 1},
    {"kind": "checkpoint", "step": 2, "path": "/etc", "bytes": 1},
    {"kind": "checkpoint", "step": 2, "path": "/etc"},
    {"kind": "metric", "step": 2**40, "values": {"loss": 1}},
    {"kind": "metric", "step": 1, "values": {"loss": 10**400}},
    {"kind": "metric", "step": 1, "values": {"a\x00b": 1}},
    {"kind": "metric", "step": True, "values": {"loss": True}},
    {"kind": "event", "code": "a\x00", "message": "b\x00", "data": {"c": "d\x00"}},
    {"kind": "event", "code": None, "message": "\ud800", "data": {}},
    {"kind": "phase", "phase": "a\x00"},
    {"kind": "progress", "step": "\x00"},
    {"kind": "resolved", "path": "\x00", "value": "\x00"},
    {"kind": "resolved"},
]


def test_a_line_that_makes_no_sense_does_not_stop_the_heartbeat(
    add: Add, claim: Claim, ledger: Any, row: Row, history: Any, tmp_path: Path
) -> None:
    """The child is not trusted: what it writes must never make its supervisor stumble."""
    for number, line in enumerate(NONSENSE):
        job_id = add()
        attempt = ledger(claim())
        journal = tmp_path / f"events{number}.jsonl"
        journal.write_text(json.dumps(line) + '\n{"kind": "phase", "phase": "saving"}\n')
        assert not attempt.beat(list(Tail(journal).read())).lost
        assert row(job_id).phase == "saving", line
        history(job_id)


def test_a_heartbeat_of_a_stale_worker_hits_nothing(
    add: Add, claim: Claim, ledger: Any, row: Row, move: Any, history: Any
) -> None:
    job_id = add()
    stale = ledger(claim())
    move(job_id, RUNNING, QUEUED, fence=Job.fence + 1)
    newer = claim(worker_id="w2")
    assert newer is not None
    before = row(job_id)
    assert stale.beat([{"kind": "phase", "phase": "x"}]).lost
    assert not stale.succeed({}, [])
    assert not stale.fail(RunError(Code.RUN_FAILED, "x"))
    assert not stale.requeue("x", "x")
    assert not stale.cancelled()
    assert not stale.crashed(Crash(1, "x"), "")
    after = row(job_id)
    assert (after.state, after.worker_id, after.hb_seq, after.fence) == (
        "running",
        "w2",
        before.hb_seq,
        before.fence,
    )
    assert ledger(newer, "w2").succeed({}, [])
    history(job_id)


def finished(name: str = "m", **facts: Any) -> Finished:
    return Finished(
        new_id("art"), "model", name, {"base_chain": ["root"], "imported": True, **facts}, Published(5, "s")
    )


def test_success_brings_its_artifacts(
    add: Add, claim: Claim, ledger: Any, row: Row, database: Database, history: Any
) -> None:
    job_id = add()
    outputs = [finished(learning={"loss": 1}), finished()]
    assert ledger(claim()).succeed({"answer": 42}, outputs)
    job = row(job_id)
    assert (job.state, job.worker_id, job.slot_id, job.phase) == ("succeeded", None, None, None)
    assert job.finished_at is not None
    assert job.result == {"answer": 42, "artifact_ids": [output.artifact_id for output in outputs]}
    with database.read() as session:
        artifacts = list(session.scalars(select(Artifact).order_by(Artifact.version)))
        assert session.scalars(select(Slot)).one().job_id is None
    assert [(a.version, a.name, a.job_id) for a in artifacts] == [(1, "m", job_id), (2, "m", job_id)]
    assert artifacts[0].learning == {"loss": 1}
    assert artifacts[0].base_chain == ["root"]
    assert [event.code for event in history(job_id)][-1] == "job_complete"


@on_sqlite
def test_a_result_whose_name_became_an_alias_meanwhile_is_told(
    add: Add, claim: Claim, ledger: Any, database: Database, history: Any
) -> None:
    first, job_id = add(), add()
    base = finished("base")
    assert ledger(claim()).succeed({}, [base])
    with database.write() as session:
        for name in ("m", "numbers"):
            session.add(Alias(project_id="proj-default", name=name, artifact_id=base.artifact_id, moved_at=now()))
    report = Finished(new_id("art"), "report", "numbers", {}, Published(5, "s"))
    assert ledger(claim()).succeed({}, [finished("m"), report])
    assert [event.code for event in history(job_id)].count("name_is_alias") == 1
    assert "name_is_alias" not in [event.code for event in history(first)]


def test_no_success_after_a_cancellation_was_asked_for(
    add: Add, claim: Claim, ledger: Any, row: Row, database: Database, history: Any
) -> None:
    job_id = add()
    attempt = ledger(claim())
    with database.write() as session:
        session.get_one(Job, job_id).cancel_requested_at = now()
    assert attempt.beat([]).cancel
    assert not attempt.succeed({}, [finished()])
    assert not attempt.fail(RunError(Code.RUN_FAILED, "x"))
    assert not attempt.requeue("x", "x")
    with database.read() as session:
        assert session.scalars(select(Artifact)).all() == []
    assert attempt.cancelled()
    assert row(job_id).state == "cancelled"
    history(job_id)


def test_a_failure_says_why(add: Add, claim: Claim, ledger: Any, row: Row, history: Any) -> None:
    job_id = add()
    assert ledger(claim()).fail(RunError(Code.BAD_DATA, "row 3", hint="mend it", param="dataset"), 65)
    job = row(job_id)
    assert (job.state, job.error_code, job.exit_code) == ("failed", "bad_data", 65)
    assert job.error_detail == {"message": "row 3", "hint": "mend it", "param": "dataset"}
    assert history(job_id)[-1].level == "error"


def test_a_requeue_waits_and_may_give_the_attempt_back(
    add: Add, claim: Claim, ledger: Any, row: Row, history: Any
) -> None:
    job_id = add()
    assert ledger(claim()).requeue("x", "again", delay=60)
    job = row(job_id)
    assert (job.state, job.attempt, job.delay_seconds, job.worker_id) == ("queued", 1, 60, None)
    assert job.not_before is not None
    assert claim() is None
    later = claim(at=now() + timedelta(seconds=61))
    assert ledger(later).requeue("x", "again", give_back=True)
    job = row(job_id)
    assert (job.attempt, job.fence, job.not_before) == (1, 2, None)
    history(job_id)


@pytest.mark.parametrize(
    ("max_attempts", "crashes", "code"), [(1, 1, "killed"), (2, 2, "killed"), (3, 2, "crash_loop")]
)
def test_a_run_that_gets_nowhere_is_given_up(
    add: Add, claim: Claim, ledger: Any, row: Row, history: Any, max_attempts: int, crashes: int, code: str
) -> None:
    job_id = add(max_attempts=max_attempts)
    for number in range(crashes):
        assert row(job_id).state == "queued", number
        assert ledger(claim(at=now() + timedelta(hours=1))).crashed(Crash(-9, "Killed."), "tail")
    assert (row(job_id).state, row(job_id).error_code) == ("failed", code)
    history(job_id)


def test_statuses_that_are_not_to_be_tried_again(add: Add, claim: Claim, ledger: Any, row: Row, history: Any) -> None:
    job_id = add()
    assert ledger(claim()).crashed(Crash(3, "Exit 3."), "tail", again=False)
    assert (row(job_id).state, row(job_id).error_code) == ("failed", "crashed")
    history(job_id)


def test_memory_of_the_host_is_tried_once_more(add: Add, claim: Claim, ledger: Any, row: Row, history: Any) -> None:
    job_id = add(max_attempts=9)
    for state in ("queued", "failed"):
        assert ledger(claim(at=now() + timedelta(hours=1))).crashed(Crash(-9, "Killed.", Code.HOST_OUT_OF_MEMORY), "")
        assert row(job_id).state == state
    assert row(job_id).error_code == "host_oom"
    history(job_id)


def test_crashes_back_off_and_then_are_final(add: Add, claim: Claim, ledger: Any, row: Row, history: Any) -> None:
    job_id = add(max_attempts=4)
    delays = []
    for _ in range(2):
        assert ledger(claim(at=now() + timedelta(hours=1))).crashed(Crash(-9, "Killed."), "tail")
        assert row(job_id).state == "queued"
        delays.append(row(job_id).delay_seconds)
    assert delays == [5, 10]
    assert ledger(claim(at=now() + timedelta(hours=1))).crashed(Crash(-9, "Killed."), "last words")
    job = row(job_id)
    assert (job.state, job.error_code, job.attempt) == ("failed", "crash_loop", 3)
    assert job.error_detail is not None
    assert "last words" in job.error_detail["hint"]
    history(job_id)
