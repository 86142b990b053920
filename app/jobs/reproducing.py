"""An artifact's run once more, to see whether the same bytes come out."""

import copy

from sqlalchemy.orm import Session

from app.artifacts import repository as artifacts
from app.catalog import Catalog
from app.errors import Code, Conflict, NotFound
from app.jobs.intake import validate_spec
from app.jobs.schemas import JobOut
from app.jobs.submission import Submission
from app.models import Job
from app.projects.caller import Caller
from app.settings import Settings


def reproduce(session: Session, settings: Settings, catalog: Catalog, caller: Caller, artifact_id: str) -> JobOut:
    """Queues the job that made an artifact again, with the spec that it ran with, every default and pin included.

    When it succeeds, ``result.reproduced`` says which files are the same. Raises NotFound for an artifact or an input
    that is gone, and Conflict for an artifact that no job of this service computed.
    """
    artifact = artifacts.get(session, caller.project_id, artifact_id)
    if artifact is None:
        raise NotFound(
            f"there is no artifact {artifact_id}", param="artifact_id", hint="GET /artifacts lists what there is."
        )
    job = session.get(Job, artifact.job_id) if artifact.job_id else None
    if job is None or job.type == "import":
        raise Conflict(
            f"{artifact_id} was imported, not computed here",
            param="artifact_id",
            code=Code.WRONG_STATE,
            hint="Import it again to compare; its hashes stand in GET /artifacts/{id}/files.",
        )
    spec = copy.deepcopy(job.resolved_spec)
    if spec.get("then"):
        spec["then"] = []
    intake = validate_spec(spec, catalog)
    return Submission(session, settings, catalog, caller).reproduce(intake, artifact_id)
