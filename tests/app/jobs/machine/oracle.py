"""What must be true of the rows after every step."""

from collections import defaultdict
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, text

from app.db import Database
from tests.app.jobs.machine.model import FINAL, Event, Model, ModelJob

COLUMNS = (
    "id, state, fence, attempt, hb_seq, worker_id, slot_id, cancel_requested_at, pause_requested_at, paused_at, "
    "delay_seconds, not_before, hold_reason, ckpt_step, prev_attempt_step, error_code, blocked_by, next_seq, "
    "finished_at, result, priority, project_id, retry_of"
)


def check(database: Database, model: Model) -> None:
    """Raises AssertionError."""
    with database.engine.connect() as connection:
        rows = {row["id"]: row for row in connection.execute(text(f"SELECT {COLUMNS} FROM job")).mappings()}
        events = histories(connection)
        slots = {
            (row.worker_id, row.slot_id): (row.job_id, row.fence)
            for row in connection.execute(text("SELECT worker_id, slot_id, job_id, fence FROM slot"))
        }
    assert set(rows) == set(model.jobs)
    for job_id, job in model.jobs.items():
        _agree(rows[job_id], job, model)
        _history(rows[job_id], events[job_id], job)
    assert {place: job_id for place, (job_id, _) in slots.items()} == model.slots
    for place, (job_id, fence) in slots.items():
        if job_id is not None:  # what stands on a slot runs there, and nowhere else
            row = rows[job_id]
            assert (row["state"], row["worker_id"], row["slot_id"], row["fence"]) == ("running", *place, fence)
    held = [job_id for job_id, _ in slots.values() if job_id]
    assert len(held) == len(set(held))


def histories(connection: Connection) -> dict[str, list[Any]]:
    """The events of every job, in order."""
    found: dict[str, list[Any]] = defaultdict(list)
    query = "SELECT job_id, seq, fence, code, from_state, to_state FROM job_event ORDER BY job_id, seq"
    for row in connection.execute(text(query)):
        found[row.job_id].append(row)
    return found


def _agree(row: Any, job: ModelJob, model: Model) -> None:
    found = {
        "state": row["state"],
        "fence": row["fence"],
        "attempt": row["attempt"],
        "beats": row["hb_seq"],
        "worker": row["worker_id"],
        "slot": row["slot_id"],
        "cancel": row["cancel_requested_at"] is not None,
        "pause": row["pause_requested_at"] is not None,
        "paused": row["paused_at"] is not None,
        "delay": row["delay_seconds"],
        "not_before": _utc(row["not_before"]),
        "hold": row["hold_reason"],
        "ckpt": row["ckpt_step"],
        "ckpt_before": row["prev_attempt_step"],
        "error": row["error_code"],
        "priority": row["priority"],
        "project": row["project_id"],
        "retry_of": row["retry_of"],
    }
    assert found == {name: getattr(job, name) for name in found}, job.id
    if job.state == "queued":
        assert row["blocked_by"] == model.unfinished_parents(job)
    # The CHECKs, said again: a migration that lost one would not be noticed otherwise.
    assert (row["state"] == "running") == (row["worker_id"] is not None)
    assert (row["state"] in FINAL) == (row["finished_at"] is not None)
    assert row["state"] != "succeeded" or row["result"] is not None


def _history(row: Any, events: list[Any], job: ModelJob) -> None:
    """The same events as the reference's; and folding them gives the row (P21)."""
    said: list[Event] = [(event.code, event.from_state, event.to_state, event.fence) for event in events]
    assert said == job.events, job.id
    check_history(row, events)


def check_history(row: Any, events: list[Any]) -> None:
    """A job's events have numbers without gaps, and folding them gives its row (P21)."""
    assert [event.seq for event in events] == list(range(1, row["next_seq"] + 1))
    assert sum(event.code == "job_complete" for event in events) == (row["state"] == "succeeded")
    state, fence, cancel, pause, paused, hold = None, 0, False, False, False, None
    for event in events:
        assert event.fence >= fence
        assert state not in FINAL or event.code == "job_retried", "final is final"
        fence = event.fence
        if event.to_state is not None:
            assert event.from_state == state
            state = event.to_state
            if event.from_state == "running" and state == "queued":
                paused, pause = pause, False
            hold = None if state == "running" else hold
        if event.code.startswith("hold_"):
            hold = None if event.code == "hold_released" else event.code.removeprefix("hold_")
        cancel = cancel or event.code == "cancel_requested"
        pause = event.code == "pause_requested" or (pause and event.code != "job_resumed")
        paused = event.code == "job_paused" or (paused and event.code != "job_resumed")
    assert (state, fence, cancel, pause, paused, hold) == (
        row["state"],
        row["fence"],
        row["cancel_requested_at"] is not None,
        row["pause_requested_at"] is not None,
        row["paused_at"] is not None,
        None if row["hold_reason"] == "slot_busy" else row["hold_reason"],  # it comes and goes too often for a history
    )


def _utc(value: Any) -> datetime | None:
    """Plain SQL gives a text on SQLite."""
    found = datetime.fromisoformat(value) if isinstance(value, str) else value
    return found if found is None or found.tzinfo else found.replace(tzinfo=UTC)
