"""Rows of workers and slots."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime

from sqlalchemy import ColumnElement, and_, or_, select
from sqlalchemy.orm import Session

from app.jobs.placement import Board, Holder, Need, Spot
from app.models import Job, Slot, Worker


def need_of(job: Job) -> Need:
    """What a job asks of a worker."""
    return Need(job.slot_class, job.gpus, job.min_vram_gb, job.memory_gb)


def living(since: datetime) -> tuple[ColumnElement[bool], ...]:
    """Conditions: workers that were seen lately. For display and choice only: no lease depends on it."""
    return (Worker.stopped_at.is_(None), Worker.seen_at > since)


def boards(session: Session, since: datetime, also: str | None = None) -> list[Board]:
    """Every worker that was seen since, and ``also``, with who is on their slots."""
    seen = and_(*living(since))
    wanted = select(Worker.id).where(seen if also is None else or_(seen, Worker.id == also))
    slots = session.scalars(select(Slot).where(Slot.worker_id.in_(wanted))).all()
    return _boards(session, slots)


def board_of(session: Session, worker_id: str) -> Board:
    """One worker's slots, locked where there are row locks: until the end of the transaction nobody else takes any."""
    slots = session.scalars(
        select(Slot)
        .where(Slot.worker_id == worker_id)
        .order_by(Slot.slot_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).all()
    return next(iter(_boards(session, slots)), Board(worker_id))


def _boards(session: Session, slots: Sequence[Slot]) -> list[Board]:
    taken = [slot.job_id for slot in slots if slot.job_id]
    # A second query: after a wait for the locks above this one sees what is true now.
    holders = {
        job.id: Holder(job.id, job.slot_id or "", need_of(job))
        for job in (session.scalars(select(Job).where(Job.id.in_(taken))).all() if taken else ())
    }
    spots: dict[str, list[Spot]] = defaultdict(list)
    for slot in slots:
        spots[slot.worker_id].append(_spot(slot, holders.get(slot.job_id or "")))
    return [Board.of(worker_id, found) for worker_id, found in sorted(spots.items())]


def _spot(slot: Slot, holder: Holder | None) -> Spot:
    facts = slot.facts or {}
    return Spot(
        worker_id=slot.worker_id,
        slot_id=slot.slot_id,
        slot_class=slot.slot_class,
        gpu=facts.get("gpu"),
        vram_gb=facts.get("vram_gb"),
        reserved=bool(facts.get("reserved")),
        holder=holder,
    )


def workers(session: Session, seen_since: datetime, limit: int) -> Sequence[Worker]:
    """Workers that were seen, or said goodbye, since then; newest first."""
    query = select(Worker).where(Worker.seen_at > seen_since)
    return session.scalars(query.order_by(Worker.started_at.desc(), Worker.id.desc()).limit(limit)).all()


def slots_of(session: Session, worker_ids: Iterable[str]) -> dict[str, list[tuple[Slot, str | None]]]:
    """The slots of workers, each with the project of the job on it."""
    found: dict[str, list[tuple[Slot, str | None]]] = defaultdict(list)
    query = (
        select(Slot, Job.project_id)
        .outerjoin(Job, Job.id == Slot.job_id)
        .where(Slot.worker_id.in_(list(worker_ids)))
        .order_by(Slot.slot_id)
    )
    for slot, project_id in session.execute(query):
        found[slot.worker_id].append((slot, project_id))
    return found
