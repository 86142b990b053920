"""Who makes room: a preemptible run for a waiting job of higher priority that finds no slot anywhere.

The run is asked as for a pause: it saves itself and goes back into the queue, its attempt given back, at its old place.
``preempt_for`` names the job that it was asked for. Until that one has started it goes before all others, so neither
the fair share nor another job of the same project takes the slot that was freed for it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.orm import Session, aliased

from app.fleet import repository as fleet
from app.jobs import claims, repository
from app.jobs.placement import Board, Need
from app.jobs.repository import Move
from app.models import Job, JobEvent
from app.states import JobState

REQUESTED = "preempt_requested"
_LOOK_AT = 20


def needed(session: Session) -> bool:
    """Whether ``settle`` or ``ask`` may have something to do."""
    query = select(Job.id).where(
        or_(Job.preempt_for.is_not(None), and_(Job.state == JobState.RUNNING, Job.preemptible.is_(True)))
    )
    return session.scalar(query.limit(1)) is not None


def settle(session: Session, at: datetime) -> None:
    """Forgets requests for jobs that no longer wait: they started, or were cancelled or put on hold."""
    other = aliased(Job)
    waiting = select(other.id).where(other.state == JobState.QUEUED, other.paused_at.is_(None))
    waiting = waiting.where(or_(other.not_before.is_(None), other.not_before <= at))
    session.execute(
        update(Job).where(Job.preempt_for.is_not(None), Job.preempt_for.not_in(waiting)).values(preempt_for=None)
    )


def ask(
    session: Session,
    boards: Sequence[Board],
    ran: Mapping[str, float],
    after: float,
    at: datetime,
    served: frozenset[str] = frozenset(),
) -> list[str]:
    """Asks runs to make room; returns their ids. ``ran`` says how many seconds each attempt was seen running.

    A run is left alone for ``after`` seconds, and is never asked twice for the same job. Among those that may be asked
    go the ones of lowest priority, the youngest first. Nobody is asked for the ``served``: they get a slot without.
    """
    may = [job for job in _preemptible(session) if ran.get(job.id, 0.0) >= after]
    if not may:
        return []
    before = _asked_before(session, [job.id for job in may])
    asked: list[str] = []
    for job in (job for job in waiting(session, at) if job.id not in served):
        lesser = [run for run in may if run.id not in asked and job.id not in before[run.id] and _is_lesser(run, job)]
        for run in who(fleet.need_of(job), boards, lesser, coming(session, job)):
            move = Move(
                JobState.RUNNING,
                REQUESTED,
                f"Asked to make room for {job.id}, whose priority is {job.priority}; the run saves itself.",
                "warn",
                {"for": job.id},
                {"preempt_for": job.id},
            )
            if repository.note(session, run.id, move, *_may_be_asked(), Job.fence == run.fence):
                asked.append(run.id)
    return asked


def _may_be_asked() -> tuple[ColumnElement[bool], ...]:
    return (
        Job.state == JobState.RUNNING,
        Job.preemptible.is_(True),
        Job.type != "serve",
        Job.preempt_for.is_(None),
        Job.cancel_requested_at.is_(None),
        Job.pause_requested_at.is_(None),
    )


def _preemptible(session: Session) -> Sequence[Job]:
    order = (Job.priority, Job.claimed_at.desc(), Job.id)
    return session.scalars(select(Job).where(*_may_be_asked()).order_by(*order)).all()


def _asked_before(session: Session, run_ids: Sequence[str]) -> Mapping[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    query = select(JobEvent.job_id, JobEvent.data).where(JobEvent.job_id.in_(run_ids), JobEvent.code == REQUESTED)
    for run_id, data in session.execute(query):
        found[run_id].add(str(data.get("for")))
    return found


def waiting(session: Session, at: datetime) -> Sequence[Job]:
    """Jobs that lack nothing but a slot, the most important first; the first twenty of them."""
    query = select(Job).where(*claims.eligible(at), Job.slot_class != "control", claims.in_its_sweeps_share())
    order = (Job.priority.desc(), Job.created_at, Job.id)
    return session.scalars(query.order_by(*order).limit(_LOOK_AT)).all()


def coming(session: Session, job: Job) -> frozenset[str]:
    """Who was asked to make room for the job and has not left yet."""
    return frozenset(session.scalars(select(Job.id).where(Job.preempt_for == job.id, Job.state == JobState.RUNNING)))


def _is_lesser(run: Job, job: Job) -> bool:
    """An engine, which people wait for, takes the place of what is as important as itself; a run does not."""
    return run.priority < job.priority or (job.type == "serve" and run.priority == job.priority)


def who(need: Need, boards: Sequence[Board], lesser: Sequence[Job], coming: frozenset[str]) -> list[Job]:
    """The runs of one worker whose end would make room; none when there is or soon will be room without."""
    if any(board.place(need, away=coming) for board in boards):
        return []
    options = [chosen for board in boards if (chosen := _who_of(need, board, lesser, coming))]
    return min(options, key=lambda chosen: (max(run.priority for run in chosen), len(chosen)), default=[])


def _who_of(need: Need, board: Board, lesser: Sequence[Job], coming: frozenset[str]) -> list[Job]:
    here = [run for run in lesser if run.worker_id == board.worker_id]

    def enough(runs: Sequence[Job]) -> bool:
        return bool(board.place(need, away=coming | {run.id for run in runs}))

    if not enough(here):
        return []
    chosen = list(here)
    for run in reversed(here):  # spare the most important and the oldest first
        rest = [other for other in chosen if other is not run]
        if enough(rest):
            chosen = rest
    return chosen
