"""Which waiting jobs have no slot anywhere: what the reconciler says of them."""

from collections.abc import Set as AbstractSet
from datetime import datetime

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.orm import Session

from app.models import Job, Slot, Worker
from app.states import JobState

NO_CAPACITY = "no_capacity"
_OF_A_GPU = ("train", "serve")


def living_classes(session: Session, seen_since: datetime) -> set[str]:
    """Classes of slots of workers that were seen lately."""
    found = set(
        session.scalars(
            select(Slot.slot_class)
            .join(Worker, Worker.id == Slot.worker_id)
            .where(Worker.stopped_at.is_(None), Worker.seen_at > seen_since)
            .distinct()
        )
    )
    return found | (set(_OF_A_GPU) if "gpu" in found else set())


def wrongly_held(session: Session, classes: AbstractSet[str]) -> bool:
    """Whether ``hold_without_capacity`` has something to do."""
    query = select(Job.id).where(or_(_to_hold(classes), _to_release(classes))).limit(1)
    return session.scalar(query) is not None


def hold_without_capacity(session: Session, classes: AbstractSet[str]) -> None:
    """T12: sets and clears the hold reason; the jobs stay queued and start as soon as there is a slot."""
    session.execute(update(Job).where(_to_hold(classes)).values(hold_reason=NO_CAPACITY))
    session.execute(update(Job).where(_to_release(classes)).values(hold_reason=None))


def _to_hold(classes: AbstractSet[str]) -> ColumnElement[bool]:
    return and_(
        Job.state == JobState.QUEUED,
        Job.blocked_by == 0,
        Job.hold_reason.is_(None),
        Job.slot_class.not_in([*classes, "control"]),
    )


def _to_release(classes: AbstractSet[str]) -> ColumnElement[bool]:
    return and_(Job.state == JobState.QUEUED, Job.hold_reason == NO_CAPACITY, Job.slot_class.in_(classes))
