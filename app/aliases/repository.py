"""Rows of aliases, and of where they pointed before."""

from collections.abc import Mapping, Sequence

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from app.models import Alias, AliasMove, Artifact


def get(session: Session, project_id: str, name: str) -> Alias | None:
    """An alias of the project."""
    return session.get(Alias, (project_id, name))


def target(session: Session, project_id: str, name: str) -> Artifact | None:
    """What an alias points to; None where there is no such alias."""
    return session.scalar(
        select(Artifact)
        .join(Alias, Alias.artifact_id == Artifact.id)
        .where(Alias.project_id == project_id, Alias.name == name)
    )


def every(session: Session, project_id: str) -> Sequence[Alias]:
    """All aliases of the project, by name."""
    return session.scalars(select(Alias).where(Alias.project_id == project_id).order_by(Alias.name)).all()


def moves(session: Session, project_id: str, name: str) -> Sequence[AliasMove]:
    """Where an alias pointed, newest first."""
    query = select(AliasMove).where(AliasMove.project_id == project_id, AliasMove.name == name)
    return session.scalars(query.order_by(AliasMove.seq.desc())).all()


def of_artifacts(session: Session, artifact_ids: Sequence[str]) -> Mapping[str, list[str]]:
    """Which aliases point to these artifacts now."""
    found: dict[str, list[str]] = {}
    query = select(Alias.artifact_id, Alias.name).where(Alias.artifact_id.in_(artifact_ids)).order_by(Alias.name)
    for artifact_id, name in session.execute(query):
        found.setdefault(artifact_id, []).append(name)
    return found


def point(session: Session, alias: Alias | None, move: AliasMove) -> None:
    """Sets an alias, or makes it, and writes the move down; ``move.artifact_id`` None takes the alias away."""
    session.add(move)
    if move.artifact_id is None:
        session.execute(delete(Alias).where(Alias.project_id == move.project_id, Alias.name == move.name))
    elif alias is None:
        session.add(
            Alias(
                project_id=move.project_id,
                name=move.name,
                artifact_id=move.artifact_id,
                canary_artifact_id=move.canary_artifact_id,
                canary_percent=move.canary_percent,
                created_by=move.created_by,
                moved_at=move.created_at,
            )
        )
    else:
        alias.artifact_id, alias.moved_at = move.artifact_id, move.created_at
        alias.canary_artifact_id, alias.canary_percent = move.canary_artifact_id, move.canary_percent
    session.flush()
