"""Chatting with a run in training: where it listens, and by which model name it is asked for."""

from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from app.models import Job
from app.settings import Settings
from app.states import JobState

SUFFIX = ":ckpt-live"


def live_socket(settings: Settings, job_id: str) -> Path:
    """A training run answers here between its steps; there only while it trains."""
    return settings.sockets / f"{job_id[-10:]}.l"


def in_training(session: Session, project_id: str, name: str | None = None) -> Sequence[Job]:
    """Runs that train now, newest first: all, or those with this id or experiment name. Reward models do not chat."""
    query = select(Job).where(
        Job.project_id == project_id,
        Job.type == "train",
        Job.state == JobState.RUNNING,
        Job.next_class.is_(None),
        Job.algorithm != "reward",
    )
    if name is not None:
        query = query.where(or_(Job.id == name, Job.experiment_name == name))
    return session.scalars(query.order_by(Job.created_at.desc(), Job.id.desc()).limit(100)).all()
