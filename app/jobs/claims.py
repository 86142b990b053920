"""Which job starts next, on which slots: T2, and where each waiting job stands in the queue."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any

from sqlalchemy import ColumnElement, Select, Subquery, and_, case, func, literal, or_, select, update
from sqlalchemy.orm import Session, aliased

from app.fleet import repository as fleet
from app.jobs import repository
from app.jobs.placement import ON_A_GPU, Board, Device, Need, Spot, best_for
from app.models import Job, Slot, Sweep, Worker, now, steady_now
from app.states import WAKING, JobState

NO_CAPACITY = "no_capacity"
_PAGE = 100
SEEN_LATELY = timedelta(seconds=120)
"""A worker that was not seen for so long is not waited for. Nothing but the choice of a worker depends on it."""

# What a job counts for in the fair share: its GPUs, or one slot. A deploy job waits without any.
WEIGHT: ColumnElement[int] = case(
    (Job.slot_class == "control", 0), (and_(Job.slot_class.in_(ON_A_GPU), Job.gpus > 1), Job.gpus), else_=1
)


def claim(
    session: Session,
    worker_id: str,
    slot_id: str,
    classes: Sequence[str],
    *,
    at: datetime | None = None,
    homes: Mapping[str, str] = MappingProxyType({}),
) -> Job | None:
    """T2: takes the next eligible job for a slot, with as many slots of the same worker as it needs, or None.

    Order: jobs for which another one was asked to make room, then the project with the fewest busy slots, then
    priority, then engines that a request woke, then age. A job that needs more than is idle keeps what there is free:
    nobody behind it takes that. ``homes``: slots in which engines sleep, by job; one is left to its own while that is
    free.
    """
    at = at or steady_now()
    board = fleet.board_of(session, worker_id)
    own = _own(board, worker_id, slot_id, classes)
    if own is None:
        return None
    board, device, leaving = own
    for job_id, need in _candidates(session, board, device, classes, at):
        home = homes.get(job_id, slot_id)
        if home != slot_id and board.device_of(home).room(need):
            continue
        rooms = board.place(need, device, leaving)
        if rooms:
            taken = [spot.slot_id for room in rooms for spot in room]
            job = _take(session, job_id, worker_id, slot_id, taken, at)
            if job is not None:
                return job
        elif device in board.kept(need) and best_for(need, _others(session, board, at)) is board:
            return None  # it waits for this device
    return None


def _own(
    board: Board, worker_id: str, slot_id: str, classes: Sequence[str]
) -> tuple[Board, Device, frozenset[str]] | None:
    """The claiming slot's device; None while it is part of a job that another slot's thread supervises."""
    try:
        device = board.device_of(slot_id)
    except StopIteration:  # the reconciler claims deploy jobs without a slot
        device = Device((Spot(worker_id, slot_id, "gpu" if len(classes) > 1 else classes[0]),))
        return Board(worker_id, (device,)), device, frozenset()
    # The thread that asks supervises, so of a shared GPU's slots its own is taken.
    mine, *others = sorted(device.spots, key=lambda spot: spot.slot_id != slot_id)
    if mine.holder is not None and mine.holder.slot_id != slot_id:
        return None
    own = Device((mine, *others))
    board = Board(worker_id, tuple(own if other == device else other for other in board.devices))
    # A thread that claims supervises nothing: what stands on its slot was given up, and waits to be reaped.
    return board, own, frozenset({mine.holder.job_id} if mine.holder else ())


def _others(session: Session, board: Board, at: datetime) -> list[Board]:
    """Every worker that could hold the job instead; this one as it was locked."""
    found = fleet.boards(session, at - SEEN_LATELY)
    return [board, *(other for other in found if other.worker_id != board.worker_id)]


def _candidates(
    session: Session, board: Board, device: Device, classes: Sequence[str], at: datetime
) -> Iterator[tuple[str, Need]]:
    """Eligible jobs in the order of claims, less those that could never run on this slot."""
    vram = device.first.vram_gb
    most = sum(other.first.slot_class == device.first.slot_class for other in board.devices)
    busy = busy_slots()
    query = (
        select(Job.id, Job.slot_class, Job.gpus, Job.min_vram_gb, Job.memory_gb)
        .outerjoin(busy, busy.c.project_id == Job.project_id)
        .where(
            *eligible(at),
            Job.slot_class.in_(classes),
            # Nothing is made ready for a job that no worker could run afterwards.
            or_(Job.next_class.is_(None), Job.hold_reason.is_(None), Job.hold_reason != NO_CAPACITY),
            or_(
                Job.slot_class.not_in(ON_A_GPU),
                and_(Job.gpus <= most, or_(Job.min_vram_gb.is_(None), Job.min_vram_gb <= (vram or 0))),
            ),
            in_its_sweeps_share(),
        )
        .order_by(in_front().desc(), func.coalesce(busy.c.slots, 0), *_own_order())
    )
    if device.first.reserved:
        query = query.where(Job.slot_class == "serve")
    offset = 0
    while rows := session.execute(query.limit(_PAGE).offset(offset)).all():
        yield from ((row.id, Need(row.slot_class, row.gpus, row.min_vram_gb, row.memory_gb)) for row in rows)
        if len(rows) < _PAGE:
            return
        offset += _PAGE


def eligible(at: datetime) -> tuple[ColumnElement[bool], ...]:
    """Conditions: nothing but a slot is missing."""
    return (
        Job.state == JobState.QUEUED,
        Job.blocked_by == 0,
        Job.paused_at.is_(None),
        Job.cancel_requested_at.is_(None),
        or_(Job.not_before.is_(None), Job.not_before <= at),
    )


def busy_slots() -> Subquery:
    """How many slots each project has."""
    return (
        select(Job.project_id, func.sum(WEIGHT).label("slots"))
        .where(Job.state == JobState.RUNNING)
        .group_by(Job.project_id)
        .subquery()
    )


def in_front() -> ColumnElement[int]:
    """1 for a job that another one was asked to make room for: the fair share must not give the slot back."""
    asked = aliased(Job)
    return case((Job.id.in_(select(asked.preempt_for).where(asked.preempt_for.is_not(None))), 1), else_=0)


def _own_order() -> tuple[ColumnElement[Any], ...]:
    """Among the jobs of one project: an engine that somebody waits for goes before others of its priority."""
    return (Job.priority.desc(), _woken().desc(), Job.created_at.asc(), Job.id.asc())


def _woken() -> ColumnElement[int]:
    """1 for the job of an engine that a request woke and that does not answer yet."""
    return case((and_(Job.type == "serve", Job.phase == WAKING), 1), else_=0)


def _take(
    session: Session, job_id: str, worker_id: str, slot_id: str, slot_ids: Sequence[str], at: datetime
) -> Job | None:
    """Moves the job, unless somebody else was faster."""
    sweep_id = session.execute(
        select(Job.sweep_id).where(Job.id == job_id, *eligible(at)).with_for_update(skip_locked=True)
    ).one_or_none()
    if sweep_id is None:
        return None
    if sweep_id[0] is not None:
        # Two workers that count at the same moment would both find room for one.
        session.execute(select(Sweep.id).where(Sweep.id == sweep_id[0]).with_for_update())
        if session.scalar(select(Job.id).where(Job.id == job_id, in_its_sweeps_share())) is None:
            return None
    values = {
        "fence": Job.fence + 1,
        "attempt": Job.attempt + 1,
        "hb_seq": Job.hb_seq + 1,
        "worker_id": worker_id,
        "slot_id": slot_id,
        "started_at": func.coalesce(Job.started_at, now()),
        "hold_reason": None,
        "preempt_for": None,
        "claimed_at": at,
        "prev_attempt_step": Job.ckpt_step,
    }
    slots = sorted(slot_ids, key=lambda name: (name != slot_id, name))
    data = {"slot": slot_id} if len(slots) == 1 else {"slot": slot_id, "slots": slots}
    move = repository.Move(JobState.RUNNING, "job_started", f"Running on {', '.join(slots)}.", data=data, values=values)
    if not repository.transition(session, job_id, JobState.QUEUED, move, *eligible(at)):
        return None
    job = session.get_one(Job, job_id, populate_existing=True)
    session.execute(
        update(Slot).where(Slot.worker_id == worker_id, Slot.slot_id.in_(slots)).values(job_id=job.id, fence=job.fence)
    )
    return job


def slots_of(session: Session, job: Job) -> list[Slot]:
    """The slots that a running job has, the one whose thread supervises it first."""
    rows = session.scalars(
        select(Slot).where(Slot.worker_id == job.worker_id, Slot.job_id == job.id, Slot.fence == job.fence)
    ).all()
    return sorted(rows, key=lambda slot: (slot.slot_id != job.slot_id, slot.slot_id))


def in_its_sweeps_share() -> ColumnElement[bool]:
    """Condition: of the job's sweep, if it has one, fewer jobs run than its ``max_parallel``."""
    running = aliased(Job)
    beside = (
        select(func.count())
        .where(running.sweep_id == Job.sweep_id, running.state == JobState.RUNNING)
        .correlate(Job)
        .scalar_subquery()
    )
    most = select(Sweep.max_parallel).where(Sweep.id == Job.sweep_id).correlate(Job).scalar_subquery()
    return or_(Job.sweep_id.is_(None), most.is_(None), beside < most)


# Places in the queue


def ranked(at: datetime, *, with_gpus: bool) -> Select[Any]:
    """Every waiting job with its place, 1 for the next, in the order in which slots will take them.

    Each start makes its project busier, so a job stands behind those that will have started before it: the slots that
    its project has, and those that its jobs ahead will have by then, come first, as in a claim.
    """
    busy = busy_slots()
    pool = case((Job.slot_class.in_(ON_A_GPU), literal("gpu")), else_=Job.slot_class) if with_gpus else Job.slot_class
    front = in_front()
    own_order = (front.desc(), *_own_order())
    ahead = func.sum(WEIGHT).over(partition_by=(pool, Job.project_id), order_by=own_order, rows=(None, -1))
    waiting = (
        select(
            Job.id,
            pool.label("pool"),
            Job.slot_class,
            Job.gpus,
            Job.min_vram_gb,
            Job.type,
            Job.algorithm,
            Job.priority,
            _woken().label("woken"),
            Job.created_at,
            front.label("front"),
            (func.coalesce(busy.c.slots, 0) + func.coalesce(ahead, 0)).label("share"),
        )
        .outerjoin(busy, busy.c.project_id == Job.project_id)
        .where(*eligible(at), or_(Job.hold_reason.is_(None), Job.hold_reason != NO_CAPACITY))
        .subquery()
    )
    row = waiting.c
    order = (row.front.desc(), row.share, row.priority.desc(), row.woken.desc(), row.created_at, row.id)
    position = func.row_number().over(partition_by=row.pool, order_by=order).label("position")
    return select(row.id, row.pool, position, row.slot_class, row.gpus, row.min_vram_gb, row.type, row.algorithm)


def queue_positions(session: Session, jobs: Sequence[Job], at: datetime | None = None) -> dict[str, int]:
    """1 for the job that is next; only queued jobs that wait for nothing but a slot have a place."""
    waiting = [job.id for job in jobs if job.state == JobState.QUEUED and job.blocked_by == 0 and job.paused_at is None]
    if not waiting:
        return {}
    places = ranked(at or now(), with_gpus=has_gpus(session)).subquery()
    rows = session.execute(select(places.c.id, places.c.position).where(places.c.id.in_(waiting)))
    return {row.id: row.position for row in rows}


def has_gpus(session: Session) -> bool:
    """Whether training and serving compete for the same slots."""
    query = select(Slot.slot_id).join(Worker, Worker.id == Slot.worker_id)
    return session.scalar(query.where(Slot.slot_class == "gpu", Worker.stopped_at.is_(None)).limit(1)) is not None


def waiting_classes(session: Session) -> set[str]:
    """Slot classes for which a job could start now."""
    return set(
        session.scalars(
            select(Job.slot_class)
            .where(
                Job.state == JobState.QUEUED,
                Job.blocked_by == 0,
                Job.paused_at.is_(None),
                or_(Job.not_before.is_(None), Job.not_before <= now()),
            )
            .distinct()
        )
    )
