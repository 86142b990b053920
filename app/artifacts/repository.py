"""Rows of artifacts."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, String, and_, cast, delete, func, or_, select
from sqlalchemy.orm import Session

from app.models import (
    Alias,
    Artifact,
    ArtifactTag,
    Checkpoint,
    DeletedArtifact,
    Deployment,
    DeploymentAdapter,
    DeploymentReplica,
    Job,
)
from app.states import DEPLOYMENT_LIVE, TERMINAL


def get(session: Session, project_id: str, artifact_id: str) -> Artifact | None:
    """An artifact of the project."""
    return session.scalar(select(Artifact).where(Artifact.id == artifact_id, Artifact.project_id == project_id))


def by_name(session: Session, project_id: str, name: str, version: int | None) -> Artifact | None:
    """A version of a name; the newest when none is given."""
    query = select(Artifact).where(Artifact.project_id == project_id, Artifact.name == name)
    if version is not None:
        query = query.where(Artifact.version == version)
    return session.scalar(query.order_by(Artifact.version.desc()).limit(1))


def by_ids(session: Session, artifact_ids: Sequence[str]) -> dict[str, Artifact]:
    """Artifacts by their ids; those that are gone are left out."""
    return {row.id: row for row in session.scalars(select(Artifact).where(Artifact.id.in_(artifact_ids)))}


def tombstone(session: Session, project_id: str, artifact_id: str) -> DeletedArtifact | None:
    """What is left of an artifact that was deleted."""
    row = session.get(DeletedArtifact, artifact_id)
    return row if row is not None and row.project_id == project_id else None


def tombstones(session: Session, artifact_ids: Sequence[str]) -> Sequence[DeletedArtifact]:
    """What is left of those of these that were deleted."""
    return session.scalars(select(DeletedArtifact).where(DeletedArtifact.id.in_(artifact_ids))).all()


def tags_of(session: Session, artifact_ids: Sequence[str]) -> dict[str, list[str]]:
    """The tags of each of these artifacts."""
    found: dict[str, list[str]] = {}
    query = select(ArtifactTag).where(ArtifactTag.artifact_id.in_(artifact_ids)).order_by(ArtifactTag.tag)
    for row in session.scalars(query):
        found.setdefault(row.artifact_id, []).append(row.tag)
    return found


def has_tag(tag: str) -> ColumnElement[bool]:
    """A condition for ``page``."""
    return Artifact.id.in_(select(ArtifactTag.artifact_id).where(ArtifactTag.tag == tag))


def set_tags(session: Session, artifact_id: str, tags: Sequence[str]) -> None:
    """These, instead of those before."""
    session.execute(delete(ArtifactTag).where(ArtifactTag.artifact_id == artifact_id))
    session.add_all(ArtifactTag(artifact_id=artifact_id, tag=tag) for tag in dict.fromkeys(tags))
    session.flush()


def users(session: Session, artifact: Artifact) -> list[str]:
    """What needs an artifact now, in words: deployments, waiting and running jobs, aliases, adapters trained on it."""
    project = artifact.project_id
    found = [
        f"deployment {row.name} ({row.id})"
        for row in session.scalars(
            select(Deployment).where(
                Deployment.project_id == project,
                Deployment.status.in_(DEPLOYMENT_LIVE),
                or_(
                    Deployment.artifact_id == artifact.id,
                    # What is to replace it, and what still finishes its requests.
                    Deployment.id.in_(
                        select(DeploymentReplica.deployment_id).where(
                            DeploymentReplica.artifact_id == artifact.id, DeploymentReplica.status.in_(DEPLOYMENT_LIVE)
                        )
                    ),
                ),
            )
        )
    ]
    found += [
        f"deployment {row.name} ({row.id}), which has it as the adapter {name}"
        for row, name in session.execute(
            select(Deployment, DeploymentAdapter.name)
            .join(DeploymentAdapter, DeploymentAdapter.deployment_id == Deployment.id)
            .where(DeploymentAdapter.artifact_id == artifact.id, Deployment.status.in_(DEPLOYMENT_LIVE))
        )
    ]
    named = [f"artifact:{artifact.id}"] + ([f"job:{artifact.job_id}"] if artifact.job_id else [])
    text = cast(Job.resolved_spec, String)
    found += [
        f"job {row}"
        for row in session.scalars(
            select(Job.id).where(
                Job.project_id == project,
                Job.state.not_in(TERMINAL),
                or_(
                    Job.reproduces == artifact.id,
                    *(text.contains(f'"{name}"', autoescape=True) for name in named),
                ),
            )
        )
    ]
    pointing = or_(Alias.artifact_id == artifact.id, Alias.canary_artifact_id == artifact.id)
    found += [f"alias {row}" for row in session.scalars(select(Alias.name).where(pointing))]
    found += [
        f"{row.kind} {row.name}:v{row.version} ({row.id}), which was trained on it"
        for row in session.scalars(
            select(Artifact).where(
                Artifact.project_id == project,
                Artifact.base_artifact_id == artifact.id,
                Artifact.kind.in_(("adapter", "reward")),
            )
        )
    ]
    return found


def delete_row(session: Session, artifact: Artifact, key_id: str) -> None:
    """Takes the row away, and keeps what lineage and version numbers need."""
    columns = ("id", "project_id", "created_by", "created_at", "job_id", "name", "version", "kind", "sha256")
    kept = {name: getattr(artifact, name) for name in (*columns, "base_chain", "base_artifact_id")}
    session.add(DeletedArtifact(**kept, deleted_by=key_id))
    session.execute(delete(ArtifactTag).where(ArtifactTag.artifact_id == artifact.id))
    session.delete(artifact)
    session.flush()


def of_job(session: Session, job_id: str) -> Sequence[Artifact]:
    """What a job left, oldest first."""
    return session.scalars(select(Artifact).where(Artifact.job_id == job_id).order_by(Artifact.created_at)).all()


def deleted_of_job(session: Session, job_id: str) -> Sequence[DeletedArtifact]:
    """What a job left and somebody deleted, oldest first."""
    query = select(DeletedArtifact).where(DeletedArtifact.job_id == job_id)
    return session.scalars(query.order_by(DeletedArtifact.created_at)).all()


def newest_reward(session: Session, project_id: str, root: str) -> Artifact | None:
    """The newest reward model that was trained on a base, whichever commit of it where it is the hub's."""
    first = Artifact.base_chain[0].as_string()
    repo = root.partition("@")[0] if root.startswith("hub:") else root
    return session.scalar(
        select(Artifact)
        .where(Artifact.project_id == project_id, Artifact.kind == "reward")
        .where(or_(first == repo, first.startswith(f"{repo}@", autoescape=True)))
        .order_by(Artifact.created_at.desc(), Artifact.id.desc())
        .limit(1)
    )


def job_of_checkpoint(session: Session, project_id: str, path: str) -> Job | None:
    """The project's job whose checkpoint lies at this path, as its row says it."""
    return session.scalar(
        select(Job)
        .join(Checkpoint, Checkpoint.job_id == Job.id)
        .where(Checkpoint.path == path, Job.project_id == project_id)
    )


def page(
    session: Session, project_id: str, limit: int, after: Artifact | None, filters: Sequence[ColumnElement[bool]] = ()
) -> Sequence[Artifact]:
    """Newest first, ``limit + 1`` rows at most."""
    query = select(Artifact).where(Artifact.project_id == project_id, *filters)
    if after is not None:
        query = query.where(
            or_(
                Artifact.created_at < after.created_at,
                and_(Artifact.created_at == after.created_at, Artifact.id < after.id),
            )
        )
    return session.scalars(query.order_by(Artifact.created_at.desc(), Artifact.id.desc()).limit(limit + 1)).all()


def next_version(session: Session, project_id: str, name: str) -> int:
    """One more than the newest version; a unique constraint settles races."""
    newest = [
        session.scalar(select(func.max(kind.version)).where(kind.project_id == project_id, kind.name == name)) or 0
        for kind in (Artifact, DeletedArtifact)
    ]
    return max(newest) + 1


def add(session: Session, job: Job, **columns: Any) -> Artifact:
    """A new version of a name, as part of the job's finishing transaction."""
    artifact = Artifact(
        project_id=job.project_id,
        created_by=job.created_by,
        job_id=job.id,
        version=next_version(session, job.project_id, columns["name"]),
        **columns,
    )
    session.add(artifact)
    session.flush()
    return artifact
