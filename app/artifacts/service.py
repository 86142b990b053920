"""What can be done with artifacts."""

from sqlalchemy.orm import Session

from app.artifacts import repository
from app.artifacts.schemas import ArtifactOut
from app.errors import NotFound
from app.models import Artifact
from app.paging import Page, page_of


def show(session: Session, project_id: str, artifact_id: str) -> ArtifactOut:
    """One artifact. Raises NotFound."""
    return ArtifactOut.of(_existing(session, project_id, artifact_id, "artifact_id"))


def listing(
    session: Session, project_id: str, limit: int, after: str | None, kind: str | None, name: str | None
) -> Page[ArtifactOut]:
    """Newest first."""
    cursor = _existing(session, project_id, after, "after") if after else None
    filters = [Artifact.kind == kind] if kind else []
    filters += [Artifact.name == name] if name else []
    rows = repository.page(session, project_id, limit, cursor, filters)
    return page_of([ArtifactOut.of(row) for row in rows], limit, [row.id for row in rows])


def _existing(session: Session, project_id: str, artifact_id: str, param: str) -> Artifact:
    row = repository.get(session, project_id, artifact_id)
    if row is None:
        raise NotFound(f"there is no artifact {artifact_id}", param=param, hint="GET /artifacts lists what there is.")
    return row
