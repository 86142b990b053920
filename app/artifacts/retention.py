"""Old checkpoints of runs that ended: deleted when the operator's retention is over, unless something needs them."""

import logging
import shutil
from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import String, cast, select
from sqlalchemy.orm import Session

from app.artifacts import view
from app.db import Database
from app.models import Checkpoint, Deployment, DeploymentAdapter, DeploymentReplica, Job
from app.states import DEPLOYMENT_LIVE, TERMINAL
from app.storage import Storage

log = logging.getLogger(__name__)
_AT_ONCE = 200


def expire(database: Database, storage: Storage, days: float, now: datetime) -> list[str]:
    """Deletes checkpoints of runs that ended more than ``days`` ago, but for the best of each; ids of what went.

    One that an unfinished job names, by its id or its folder, stays; so does one that a live deployment serves, or has
    as an adapter, also where that was put away for the moment: it is loaded again when it is asked for. The row goes
    before the bytes: what is half deleted is nobody's checkpoint any more. At most a few hundred a call.
    """
    with database.write() as session:
        named = _named(session)
        rows = [
            row for row in _old(session, now - timedelta(days=days)) if row.id not in named and row.path not in named
        ]
        found = [(row.id, row.job_id, storage.root / row.path) for row in rows]
        for row in rows:
            session.delete(row)
    for checkpoint_id, job_id, folder in found:
        shutil.rmtree(folder, ignore_errors=True)
        log.info("checkpoint %s of %s is deleted: %s days are over", checkpoint_id, job_id, days)
    for job_id in dict.fromkeys(job_id for _, job_id, _ in found):
        view.refresh_job(database, storage, job_id)
    return [checkpoint_id for checkpoint_id, _, _ in found]


def _old(session: Session, before: datetime) -> Sequence[Checkpoint]:
    return session.scalars(
        select(Checkpoint)
        .join(Job, Job.id == Checkpoint.job_id)
        .where(Job.state.in_(TERMINAL), Job.finished_at < before, Checkpoint.best.is_(False))
        .order_by(Checkpoint.created_at)
        .limit(_AT_ONCE)
    ).all()


def _named(session: Session) -> str:
    """All that unfinished jobs and live deployments say, in one text: who looks for an id or a path in it finds it."""
    live = Deployment.status.in_(DEPLOYMENT_LIVE)
    named = (
        select(cast(Job.resolved_spec, String)).where(Job.state.not_in(TERMINAL)),
        select(Deployment.model).where(live),
        select(cast(Deployment.coming, String)).where(live, Deployment.coming.is_not(None)),
        select(DeploymentAdapter.model).join(Deployment, Deployment.id == DeploymentAdapter.deployment_id).where(live),
        # What an engine still has, although nobody wants it any more.
        select(cast(DeploymentReplica.loaded, String)).where(DeploymentReplica.status.in_(DEPLOYMENT_LIVE)),
    )
    return "\n".join(text for query in named for text in session.scalars(query))
