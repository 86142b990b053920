"""When a waiting job will probably start: an estimate from what runs now and from how long such jobs took of late.

The queue is played through in the order of claims, each job on the worker that has room first. A running job ends when
it says so itself (``progress.eta_seconds``), else after the median run time of its kind; engines never end. Where a
time that is needed is not known, neither is the answer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import inf
from statistics import median

from sqlalchemy import select, union_all
from sqlalchemy.orm import Session

from app.fleet import repository as fleet
from app.jobs import claims
from app.jobs.placement import Board, Device, Need
from app.models import Job, now
from app.states import JobState

FURTHEST = 500
"""Behind so many others nobody can say."""
_LATELY = 9

Kind = tuple[str, str | None]
"""Type and algorithm: such jobs take about as long as each other."""


@dataclass(frozen=True)
class Place:
    """Where a job stands in the queue; 1 is the next."""

    position: int
    starts_at: datetime | None = None


def places(session: Session, jobs: Sequence[Job], at: datetime | None = None) -> dict[str, Place]:
    """The places of those of the jobs that wait for nothing but a slot."""
    at = at or now()
    positions = claims.queue_positions(session, jobs, at)
    if not positions:
        return {}
    ranked = claims.ranked(at, with_gpus=claims.has_gpus(session)).subquery()
    furthest = min(max(positions.values()), FURTHEST)
    queue = session.execute(
        select(ranked).where(ranked.c.position <= furthest).order_by(ranked.c.pool, ranked.c.position)
    ).all()
    boards = fleet.boards(session, at - claims.SEEN_LATELY)
    holders = {job_id for board in boards for device in board.devices for job_id in device.holders}
    running = session.scalars(select(Job).where(Job.id.in_(holders))).all() if holders else []
    kinds = {(row.type, row.algorithm) for row in queue} | {(job.type, job.algorithm) for job in running}
    took = _run_times(session, kinds)
    free = _free_in(boards, {job.id: _left(job, took, at) for job in running})
    starts: dict[str, float] = {}
    for row in queue:
        need = Need(row.slot_class, row.gpus, row.min_vram_gb)
        lasts = inf if need.slot_class == "serve" else took.get((row.type, row.algorithm), inf)
        starts[row.id] = _start(need, boards, free, lasts)
    return {
        job_id: Place(position, None if (wait := starts.get(job_id, inf)) == inf else at + timedelta(seconds=wait))
        for job_id, position in positions.items()
    }


def _run_times(session: Session, kinds: Iterable[Kind]) -> dict[Kind, float]:
    """The median time in slots of the last jobs of each kind that succeeded, in seconds; one query."""
    latest = [
        select(Job.type, Job.algorithm, Job.run_seconds, Job.started_at, Job.finished_at)
        .where(
            Job.type == type_,
            Job.algorithm.is_not_distinct_from(algorithm),
            Job.state == JobState.SUCCEEDED,
        )
        .order_by(Job.finished_at.desc())
        .limit(_LATELY)
        .subquery()
        for type_, algorithm in sorted(kinds, key=str)
    ]
    if not latest:
        return {}
    times: dict[Kind, list[float]] = {}
    for row in session.execute(union_all(*(select(one) for one in latest))):
        whole = (row.finished_at - row.started_at).total_seconds() if row.started_at else 0.0
        times.setdefault((row.type, row.algorithm), []).append(row.run_seconds or whole)
    return {kind: median(found) for kind, found in times.items()}


def _left(job: Job, took: Mapping[Kind, float], at: datetime) -> float:
    """Seconds until a running job will probably end."""
    if job.type == "serve":
        return inf
    told = (job.progress or {}).get("eta_seconds")
    if isinstance(told, int | float):
        return max(0.0, float(told))
    ran = (at - job.claimed_at).total_seconds() if job.claimed_at else 0.0
    return max(0.0, took.get((job.type, job.algorithm), inf) - ran)


def _free_in(boards: Sequence[Board], left: Mapping[str, float]) -> dict[Device, float]:
    return {
        device: max((left.get(job_id, 0.0) for job_id in device.holders), default=0.0)
        for board in boards
        for device in board.devices
    }


def _start(need: Need, boards: Sequence[Board], free: dict[Device, float], lasts: float) -> float:
    """Seconds until the job starts; its devices are taken until it ends."""
    best: tuple[float, list[Device]] = (inf, [])
    for board in boards:
        for group in board.groups(need):
            soonest = sorted(group, key=lambda device: free[device])[: need.devices]
            if len(soonest) == need.devices:
                best = min(best, (free[soonest[-1]], soonest), key=lambda option: option[0])
    start, chosen = best
    for device in chosen:
        free[device] = start + lasts
    return start
