"""Rows of the adapters that deployments are to have loaded."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from app.models import Deployment, DeploymentAdapter, DeploymentReplica
from app.states import DEPLOYMENT_LIVE, AdapterState


def of(session: Session, deployment_ids: Sequence[str]) -> dict[str, list[DeploymentAdapter]]:
    """By deployment, in the order of their names."""
    found: dict[str, list[DeploymentAdapter]] = {deployment_id: [] for deployment_id in deployment_ids}
    query = select(DeploymentAdapter).where(DeploymentAdapter.deployment_id.in_(deployment_ids))
    for row in session.scalars(query.order_by(DeploymentAdapter.name)):
        found[row.deployment_id].append(row)
    return found


def get(session: Session, deployment_id: str, name: str) -> DeploymentAdapter | None:
    """One adapter of a deployment."""
    return session.get(DeploymentAdapter, (deployment_id, name))


def by_name(session: Session, project_id: str, name: str) -> tuple[DeploymentAdapter, Deployment] | None:
    """The adapter that is, or is about to be, reachable by a name, with its deployment."""
    row = session.execute(
        select(DeploymentAdapter, Deployment)
        .join(Deployment, Deployment.id == DeploymentAdapter.deployment_id)
        .where(
            DeploymentAdapter.project_id == project_id,
            DeploymentAdapter.name == name,
            Deployment.status.in_(DEPLOYMENT_LIVE),
        )
    ).one_or_none()
    return (row[0], row[1]) if row is not None else None


def live(session: Session, project_id: str) -> Sequence[tuple[DeploymentAdapter, Deployment]]:
    """Every adapter of the project that has a name now, newest first."""
    rows = session.execute(
        select(DeploymentAdapter, Deployment)
        .join(Deployment, Deployment.id == DeploymentAdapter.deployment_id)
        .where(DeploymentAdapter.project_id == project_id, Deployment.status.in_(DEPLOYMENT_LIVE))
        .order_by(DeploymentAdapter.created_at.desc())
    ).all()
    return [(row[0], row[1]) for row in rows]


def of_artifact(session: Session, artifact_id: str) -> Sequence[DeploymentAdapter]:
    """Where an artifact is loaded, or to be loaded."""
    return session.scalars(select(DeploymentAdapter).where(DeploymentAdapter.artifact_id == artifact_id)).all()


def drop(session: Session, deployment_id: str, name: str | None = None) -> bool:
    """Takes one adapter, or all, off a deployment; its engine lets go of what has no row. False: there was none."""
    query = delete(DeploymentAdapter).where(DeploymentAdapter.deployment_id == deployment_id)
    if name is not None:
        query = query.where(DeploymentAdapter.name == name)
    return (
        session.scalar(query.returning(DeploymentAdapter.name).execution_options(synchronize_session="fetch"))
        is not None
    )


def move(
    session: Session,
    row: DeploymentAdapter,
    to: AdapterState,
    *,
    only_from: Sequence[AdapterState] = tuple(AdapterState),
    **values: Any,
) -> bool:
    """A step of one adapter, unless its row was taken away or given to another adapter meanwhile."""
    moved = session.scalar(
        update(DeploymentAdapter)
        .where(
            DeploymentAdapter.deployment_id == row.deployment_id,
            DeploymentAdapter.name == row.name,
            DeploymentAdapter.model == row.model,
            DeploymentAdapter.status.in_(only_from),
        )
        .values({"status": to, **values})
        .returning(DeploymentAdapter.name)
    )
    session.expire_all()
    return moved is not None


def what_is_gone_is_waited_for(session: Session, deployment_id: str) -> None:
    """Adapters that no engine has any more, because the one that had them ended, are to be loaded anew."""
    engines = select(DeploymentReplica.loaded).where(
        DeploymentReplica.deployment_id == deployment_id, DeploymentReplica.status.in_(DEPLOYMENT_LIVE)
    )
    kept = {name for names in session.scalars(engines) for name in names}
    session.execute(
        update(DeploymentAdapter)
        .where(
            DeploymentAdapter.deployment_id == deployment_id,
            DeploymentAdapter.status == AdapterState.READY,
            DeploymentAdapter.name.not_in(kept),
        )
        .values(status=AdapterState.WAITING)
    )
