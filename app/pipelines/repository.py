"""Rows of pipelines, of their steps, and of the jobs that belong to them."""

from collections.abc import Sequence

from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session, aliased

from app.models import Job, Pipeline, PipelineStep


def get(session: Session, project_id: str, pipeline_id: str) -> Pipeline | None:
    """A pipeline of the project."""
    return session.scalar(select(Pipeline).where(Pipeline.id == pipeline_id, Pipeline.project_id == project_id))


def by_idempotency_key(session: Session, project_id: str, key: str) -> Pipeline | None:
    """The pipeline that a key made."""
    return session.scalar(select(Pipeline).where(Pipeline.project_id == project_id, Pipeline.idem_key == key))


def page(session: Session, project_id: str, limit: int, after: Pipeline | None) -> Sequence[Pipeline]:
    """Newest first, ``limit + 1`` rows at most."""
    query = select(Pipeline).where(Pipeline.project_id == project_id)
    if after is not None:
        older = and_(Pipeline.created_at == after.created_at, Pipeline.id < after.id)
        query = query.where(or_(Pipeline.created_at < after.created_at, older))
    return session.scalars(query.order_by(Pipeline.created_at.desc(), Pipeline.id.desc()).limit(limit + 1)).all()


def steps(session: Session, pipeline_ids: Sequence[str]) -> dict[str, list[PipelineStep]]:
    """Each pipeline's steps, in the order of the request."""
    found: dict[str, list[PipelineStep]] = {pipeline_id: [] for pipeline_id in pipeline_ids}
    rows = session.scalars(
        select(PipelineStep).where(PipelineStep.pipeline_id.in_(pipeline_ids)).order_by(PipelineStep.position)
    )
    for row in rows:
        found[row.pipeline_id].append(row)
    return found


def jobs(session: Session, pipeline_ids: Sequence[str]) -> dict[str, list[Job]]:
    """Each pipeline's jobs, oldest first, without those that were retried: their successors count."""
    later = aliased(Job)
    found: dict[str, list[Job]] = {pipeline_id: [] for pipeline_id in pipeline_ids}
    rows = session.scalars(
        select(Job)
        .where(
            Job.pipeline_id.in_(pipeline_ids),
            ~select(later.id).where(later.retry_of == Job.id, later.pipeline_id == Job.pipeline_id).exists(),
        )
        .order_by(Job.created_at, Job.id)
    )
    for row in rows:
        if row.pipeline_id is not None:
            found[row.pipeline_id].append(row)
    return found
