"""Rows of deployments."""

from collections.abc import Sequence

from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from app.models import Deployment, DeploymentAdapter
from app.states import DEPLOYMENT_LIVE


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
    """Names under which an artifact is served or about to be: deployments of its own, then as an adapter of others.

    What makes embeddings of it only where nothing answers as it: the two have no route in common.
    """
    own = (
        select(Deployment)
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
    rows = session.scalars(own).all()
    answering = [*(row.name for row in rows if not embeds(row)), *session.scalars(loaded)]
    return answering or [row.name for row in rows]


def embeds(row: Deployment) -> bool:
    """Whether a deployment makes embeddings in place of answers."""
    return row.options.get("task") == "embed"


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
