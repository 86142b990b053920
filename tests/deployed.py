"""Deployments as rows: one that answers without a worker, and what a worker would say of one."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.deployments import replicas
from app.models import DEFAULT_PROJECT, Deployment, DeploymentReplica
from app.states import DeploymentState

READY = DeploymentState.READY


def engine_of(session: Session, deployment_id: str) -> DeploymentReplica:
    """Its youngest replica."""
    query = select(DeploymentReplica).where(DeploymentReplica.deployment_id == deployment_id)
    order = (DeploymentReplica.generation.desc(), DeploymentReplica.created_at.desc(), DeploymentReplica.id.desc())
    return session.scalars(query.order_by(*order).limit(1)).one()


def said(session: Session, deployment_id: str, to: DeploymentState, **values: Any) -> bool:
    """What the worker of its youngest replica says."""
    return replicas.move(session, engine_of(session, deployment_id).id, to, **values)


def add_deployment(
    session: Session,
    name: str,
    *,
    status: DeploymentState = READY,
    project: str = DEFAULT_PROJECT,
    artifact_id: str | None = None,
    socket: str | None = "/nowhere.sock",
) -> Deployment:
    """A deployment ``dep-<name>`` with one replica, both of this status."""
    row = Deployment(id=f"dep-{name}", project_id=project, name=name, model="m", artifact_id=artifact_id, options={})
    row.created_by = None
    session.add(row)
    session.flush()
    replica = session.get_one(DeploymentReplica, replicas.add(session, row, 1, "m", artifact_id, {}))
    replica.status, replica.socket = status, socket
    row.status = status
    session.flush()
    return row
