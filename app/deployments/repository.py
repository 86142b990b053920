"""Rows of deployments, and the guarded moves between their states."""

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, delete, or_, select, update
from sqlalchemy.orm import Session

from app.models import Deployment, DeploymentAdapter, Job, now
from app.states import DEPLOYMENT_LIVE, DEPLOYMENT_MOVES, TERMINAL, DeploymentState


def get(session: Session, project_id: str, deployment_id: str) -> Deployment | None:
    """A deployment of the project."""
    return session.scalar(select(Deployment).where(Deployment.id == deployment_id, Deployment.project_id == project_id))


def live_by_name(session: Session, project_id: str, name: str) -> Deployment | None:
    """The deployment that is, or is about to be, reachable by a name."""
    return session.scalar(
        select(Deployment).where(
            Deployment.project_id == project_id, Deployment.name == name, Deployment.status.in_(DEPLOYMENT_LIVE)
        )
    )


def live(session: Session, project_id: str) -> Sequence[Deployment]:
    """Everything that is being served, newest first."""
    return session.scalars(
        select(Deployment)
        .where(Deployment.project_id == project_id, Deployment.status.in_(DEPLOYMENT_LIVE))
        .order_by(Deployment.created_at.desc())
    ).all()


def serving(session: Session, project_id: str, artifact_id: str) -> Sequence[str]:
    """Names under which an artifact is served or about to be: deployments of its own, then as an adapter of others."""
    own = (
        select(Deployment.name)
        .where(
            Deployment.project_id == project_id,
            Deployment.artifact_id == artifact_id,
            Deployment.status.in_(DEPLOYMENT_LIVE),
        )
        .order_by(Deployment.created_at.desc())
    )
    loaded = (
        select(DeploymentAdapter.name)
        .join(Deployment, Deployment.id == DeploymentAdapter.deployment_id)
        .where(
            DeploymentAdapter.project_id == project_id,
            DeploymentAdapter.artifact_id == artifact_id,
            Deployment.status.in_(DEPLOYMENT_LIVE),
        )
        .order_by(DeploymentAdapter.created_at.desc())
    )
    return [*session.scalars(own), *session.scalars(loaded)]


def certify(session: Session, deployment_id: str, certificate: dict[str, Any]) -> None:
    """Keeps whether the engine says what the model says."""
    session.execute(update(Deployment).where(Deployment.id == deployment_id).values(parity=certificate))


def page(session: Session, project_id: str, limit: int, after: Deployment | None) -> Sequence[Deployment]:
    """Newest first, ``limit + 1`` rows at most."""
    query = select(Deployment).where(Deployment.project_id == project_id)
    if after is not None:
        query = query.where(
            or_(
                Deployment.created_at < after.created_at,
                and_(Deployment.created_at == after.created_at, Deployment.id < after.id),
            )
        )
    return session.scalars(query.order_by(Deployment.created_at.desc(), Deployment.id.desc()).limit(limit + 1)).all()


def orphans() -> Select[Deployment, Job]:
    """Live deployments whose replica's job is final."""
    return (
        select(Deployment, Job)
        .join(Job, Job.id == Deployment.replica_job_id)
        .where(Deployment.status.in_(DEPLOYMENT_LIVE), Job.state.in_([str(state) for state in TERMINAL]))
    )


def transition(
    session: Session,
    deployment_id: str,
    to: DeploymentState,
    *,
    replica: str | None = None,
    only_from: Collection[DeploymentState] | None = None,
    guard: Sequence[ColumnElement[bool]] = (),
    **values: Any,
) -> bool:
    """Moves a deployment if the table allows it from where it is, and if ``replica`` still serves it."""
    origins = [state for state, targets in DEPLOYMENT_MOVES.items() if to in targets or state == to]
    guards = [*guard, Deployment.id == deployment_id, Deployment.status.in_(set(origins) & set(only_from or origins))]
    if replica is not None:
        guards.append(Deployment.replica_job_id == replica)
    if to in (DeploymentState.STOPPED, DeploymentState.FAILED):
        values |= {"stopped_at": now(), "socket": None}
    moved = session.scalar(update(Deployment).where(*guards).values({"status": to, **values}).returning(Deployment.id))
    if moved is not None and to in (DeploymentState.STOPPED, DeploymentState.FAILED):
        # Their names are free again.
        session.execute(delete(DeploymentAdapter).where(DeploymentAdapter.deployment_id == deployment_id))
    session.expire_all()
    return moved is not None


def wake(session: Session, row: Deployment) -> bool:
    """A deployment that sleeps is to serve again; its replica's job goes on. False when it does not sleep any more."""
    if not transition(session, row.id, DeploymentState.QUEUED, only_from=[DeploymentState.SLEEPING]):
        return False
    # Whatever the job is doing: a replica that is still ending finds its deployment awake, and starts again.
    session.execute(update(Job).where(Job.id == row.replica_job_id).values(paused_at=None, eligible_at=now()))
    session.expire_all()
    return True
