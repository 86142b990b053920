"""Which waiting jobs have no slot anywhere, or only slots that engines hold: what the reconciler says of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, or_, select, update
from sqlalchemy.orm import Session

from app.jobs import repository
from app.jobs.claims import NO_CAPACITY
from app.jobs.placement import Board, Need
from app.jobs.repository import Move
from app.models import Job
from app.states import JobState

SLOT_BUSY = "slot_busy"
_OURS = (NO_CAPACITY, SLOT_BUSY)
_AT_ONCE = 100


@dataclass(frozen=True)
class Change:
    """Waiting jobs with the same needs whose hold reason is no longer, or not yet, true."""

    need: Need
    after: Need | None
    """What it needs once its inputs are ready, if that is still to come."""
    shown: str | None
    reason: str | None


def reason_for(need: Need, boards: Sequence[Board], after: Need | None = None) -> str | None:
    """Why a job with these needs cannot start whatever else ends by itself; None when it will.

    Nothing is made ready for a job that could not run ``after`` that.
    """
    if after is not None and not any(board.could_hold(after) for board in boards):
        return NO_CAPACITY
    able = [board for board in boards if board.could_hold(need)]
    if not able:
        return NO_CAPACITY
    # Runs end by themselves, engines do not.
    return None if any(board.place(need, away=_runs(board)) for board in able) else SLOT_BUSY


def _runs(board: Board) -> frozenset[str]:
    holders = [holder for device in board.devices for holder in device.holders.values()]
    return frozenset(holder.job_id for holder in holders if holder.need.slot_class != "serve")


def changes(session: Session, boards: Sequence[Board]) -> list[Change]:
    """What ``apply`` has to do."""
    kinds = session.execute(
        select(Job.slot_class, Job.next_class, Job.gpus, Job.min_vram_gb, Job.hold_reason)
        .where(*_waiting(), or_(Job.hold_reason.is_(None), Job.hold_reason.in_(_OURS)))
        .distinct()
    ).all()
    found = []
    for slot_class, next_class, gpus, min_vram_gb, shown in kinds:
        need = Need(slot_class, gpus, min_vram_gb)
        after = Need(next_class, gpus, min_vram_gb) if next_class else None
        reason = reason_for(need, boards, after)
        if reason != shown:
            found.append(Change(need, after, shown, reason))
    return found


def apply(session: Session, boards: Sequence[Board], found: Sequence[Change]) -> None:
    """T12: the jobs stay queued and start as soon as there is a slot. The first time, their history says why."""
    for change in found:
        same = (*_waiting(), *_with(change.need, change.after), Job.hold_reason.is_not_distinct_from(change.shown))
        if NO_CAPACITY not in (change.shown, change.reason):
            session.execute(update(Job).where(*same).values(hold_reason=change.reason))
            continue
        missing = change.need if reason_for(change.need, boards) == NO_CAPACITY else change.after or change.need
        move = _held(missing, boards) if change.reason == NO_CAPACITY else _released(change.reason)
        for job_id in session.scalars(select(Job.id).where(*same).limit(_AT_ONCE)).all():
            repository.note(session, job_id, move, *same)


def _held(need: Need, boards: Sequence[Board]) -> Move:
    wanted = f"{need.devices} {need.slot_class} slot{'s' if need.devices > 1 else ''}"
    if need.vram_gb is not None:
        wanted += f" with {need.vram_gb:g} GB of GPU memory each"
    firsts = [device.first for board in boards for device in board.devices]
    classes = ", ".join(sorted({first.slot_class for first in firsts})) or "none"
    largest = max((first.vram_gb or 0 for first in firsts), default=0)
    hint = f"Living workers have slots of these classes: {classes}"
    hint += f"; the largest GPU has {largest:g} GB" if largest else ""
    hint += ". Start a worker that has what is missing, or cancel the job and ask for less; GET /workers lists them."
    return Move(
        JobState.QUEUED,
        "hold_no_capacity",
        f"No worker has {wanted}; the job waits for one that has.",
        "warn",
        {"hint": hint},
        {"hold_reason": NO_CAPACITY},
    )


def _released(reason: str | None) -> Move:
    return Move(
        JobState.QUEUED, "hold_released", "A worker that can run the job is there.", values={"hold_reason": reason}
    )


def _waiting() -> tuple[ColumnElement[bool], ...]:
    return (Job.state == JobState.QUEUED, Job.blocked_by == 0, Job.paused_at.is_(None), Job.slot_class != "control")


def _with(need: Need, after: Need | None) -> tuple[ColumnElement[bool], ...]:
    return (
        Job.slot_class == need.slot_class,
        Job.next_class.is_not_distinct_from(after.slot_class if after else None),
        Job.gpus == need.gpus,
        Job.min_vram_gb.is_not_distinct_from(need.min_vram_gb),
    )
