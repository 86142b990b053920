"""The guarded moves between a job's states, one by one, on every database."""

import json
import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from app.db import Database
from app.errors import Code, RunError
from app.jobs import claims, repository
from app.jobs.repository import Move
from app.models import Artifact, Job, Metric, Slot, new_id, now
from app.queue import SilentDoorbell
from app.states import JOB_MOVES, JobState
from app.storage import Published, Storage
from workers.journal import Tail
from workers.ledger import Crash, Finished, Ledger

Claim = Callable[..., Job | None]
Add = Callable[..., str]
Row = Callable[[str], Job]
QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = JobState


@pytest.fixture
def ledger(database: Database, storage: Storage) -> Callable[[Job | None], Ledger]:
    """The worker's side of a claimed job."""

    def ledger(job: Job | None, worker_id: str = "w1") -> Ledger:
        assert job is not None
        return Ledger(database, storage, SilentDoorbell(), job, worker_id)

    return ledger


def test_a_claim_makes_the_job_running_and_takes_the_slot(
    add: Add, claim: Claim, row: Row, history: Any, database: Database
) -> None:
    job_id = add()
    job = claim()
    assert job is not None
    assert job.id == job_id
    assert (job.state, job.worker_id, job.slot_id, job.fence, job.attempt, job.hb_seq) == (
        "running",
        "w1",
        "light-0",
        1,
        1,
        1,
    )
    assert job.started_at is not None
    with database.read() as session:
        slot = session.scalars(select(Slot)).one()
    assert (slot.job_id, slot.fence) == (job_id, 1)
    assert claim() is None
    assert [event.code for event in history(job_id)] == ["job_queued", "job_started"]


@pytest.mark.parametrize(
    "columns",
    [
        {"blocked_by": 1},
        {"paused_at": now()},
        {"cancel_requested_at": now()},
        {"not_before": now() + timedelta(hours=1)},
        {"slot_class": "train"},
    ],
)
def test_what_cannot_be_claimed(add: Add, claim: Claim, database: Database, columns: dict[str, Any]) -> None:
    job_id = add()
    with database.write() as session:
        for name, value in columns.items():
            setattr(session.get_one(Job, job_id), name, value)
    assert claim() is None


def test_what_waits_for_its_time_is_claimed_then(add: Add, claim: Claim) -> None:
    job_id = add(not_before=now() + timedelta(hours=1))
    assert claim() is None
    job = claim(at=now() + timedelta(hours=2))
    assert job is not None
    assert job.id == job_id


def test_the_order_of_claims(add: Add, claim: Claim) -> None:
    """The project with the fewest running jobs, then priority, then age."""
    base = now()
    old = add(created_at=base, project_id="a")
    older = add(created_at=base - timedelta(seconds=9), project_id="a")
    urgent = add(created_at=base + timedelta(seconds=9), project_id="a", priority=1)
    modest = add(created_at=base + timedelta(seconds=10), project_id="b", priority=-5)
    order = [job.id for job in iter(claim, None)]
    assert order == [urgent, modest, older, old]


def test_queue_positions_follow_the_class(add: Add, database: Database) -> None:
    base = now()
    ids = {
        "second": add(created_at=base),
        "first": add(created_at=base + timedelta(seconds=1), priority=1),
        "blocked": add(),
        "paused": add(paused_at=base),
        "other": add(slot_class="train", created_at=base + timedelta(seconds=5)),
    }
    with database.write() as session:
        session.get_one(Job, ids["blocked"]).blocked_by = 1
    with database.read() as session:
        jobs = session.scalars(select(Job)).all()
        places = claims.queue_positions(session, jobs)
    assert places == {ids["first"]: 1, ids["second"]: 2, ids["other"]: 1}


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


def test_children_start_when_every_parent_succeeded(
    add: Add, claim: Claim, ledger: Any, row: Row, history: Any
) -> None:
    first, second = add(), add()
    child = add((first, second))
    assert row(child).blocked_by == 2
    ledger(claim()).succeed({}, [])
    assert row(child).blocked_by == 1
    ledger(claim()).succeed({}, [])
    assert row(child).blocked_by == 0
    job = claim()
    assert job is not None
    assert job.id == child
    history(child)


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_children_fall_with_a_parent_all_the_way_down(
    add: Add, claim: Claim, ledger: Any, row: Row, history: Any, move: Any, end: str
) -> None:
    parent, bystander = add(), add(created_at=now() + timedelta(seconds=1))
    child = add((parent, bystander))
    grandchild = add((child, parent))
    if end == "failed":
        ledger(claim()).fail(RunError(Code.RUN_FAILED, "x"))
    else:
        move(parent, QUEUED, CANCELLED)
    for job_id in (child, grandchild):
        job = row(job_id)
        assert (job.state, job.error_code) == ("cancelled", "dependency_failed")
        history(job_id)
    assert row(bystander).state == "queued"
    assert history(grandchild)[-1].data["parent"] in (child, parent)


def test_the_verb_refuses_moves_that_the_table_does_not_know(add: Add, database: Database) -> None:
    job_id = add()
    for origin in JobState:
        for to in set(JobState) - JOB_MOVES[origin] - {origin}:
            with database.write() as session, pytest.raises(ValueError, match="no move"):
                repository.transition(session, job_id, origin, Move(to, "x", "x"))


def test_a_move_from_another_state_is_a_lost_race(add: Add, row: Row, move: Any, history: Any) -> None:
    job_id = add()
    assert move(job_id, QUEUED, CANCELLED)
    assert not move(job_id, QUEUED, RUNNING, worker_id="w")
    assert not move(job_id, RUNNING, FAILED)
    assert row(job_id).state == "cancelled"
    assert len(history(job_id)) == 2


def test_a_move_that_is_rolled_back_leaves_no_event(add: Add, row: Row, history: Any, database: Database) -> None:
    job_id = add()

    def broken() -> None:
        with database.write() as session:
            assert repository.transition(session, job_id, QUEUED, Move(CANCELLED, "x", "x"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert row(job_id).state == "queued"
    assert len(history(job_id)) == 1


def _race(url: str, worker_id: str, start: Any, won: Any) -> None:
    database = Database(url)
    start.wait(30)
    while True:
        with database.write() as session:
            job = claims.claim(session, worker_id, "light-0", ["light"])
        if job is None:
            break
        won.put((job.id, worker_id, job.fence))
    won.put(None)
    database.close()


@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
def test_eight_processes_claim_and_each_job_has_one_winner(
    add: Add, row: Row, history: Any, database: Database
) -> None:
    ids = [add() for _ in range(12)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["app.jobs.repository", "tests.support"])
    start, won = context.Barrier(8), context.Queue()
    processes = [context.Process(target=_race, args=(database.url, f"w{number}", start, won)) for number in range(8)]
    for process in processes:
        process.start()
    wins = []
    done = 0
    while done < 8:
        item = won.get(timeout=60)
        done += item is None
        wins += [item] if item else []
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert sorted(job_id for job_id, _, _ in wins) == sorted(ids)
    for job_id, worker_id, fence in wins:
        job = row(job_id)
        assert (job.worker_id, job.fence, job.attempt, fence) == (worker_id, 1, 1, 1)
        history(job_id)
