"""``/artifacts``: what jobs left."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse, PlainTextResponse

from app.artifacts import card, diagnosis, service
from app.artifacts.lineage import Direction, Lineage, lineage
from app.artifacts.schemas import ArtifactFiles, ArtifactOut, ArtifactPatch, ImportBody
from app.db import after_commit
from app.deps import After, Limit, Reader, RoomsDep, Submitter
from app.jobs.intake import validate_spec
from app.jobs.reproducing import reproduce
from app.jobs.schemas import JobOut
from app.jobs.submission import Submission
from app.paging import Deleted, Page

router = APIRouter(prefix="/artifacts", tags=["artifacts"])


@router.get("", summary="List artifacts, newest first")
def list_artifacts(
    caller: Reader,
    rooms: RoomsDep,
    limit: Limit = 20,
    after: After = None,
    kind: Annotated[Literal["adapter", "model", "reward", "report", "gguf"] | None, Query()] = None,
    name: Annotated[str | None, Query(max_length=63)] = None,
    tag: Annotated[str | None, Query(max_length=63)] = None,
) -> Page[ArtifactOut]:
    """Adapters, merged models and reports of the project."""
    with rooms.database.read() as session:
        return service.listing(session, caller.project_id, limit, after, kind, name, tag)


@router.post("/import", status_code=201, summary="Import a model or an adapter")
def import_artifact(body: ImportBody, caller: Submitter, rooms: RoomsDep) -> JobOut:
    """A job of type `import`: a folder under the model roots, or a GGUF file, becomes an artifact."""
    with rooms.database.write() as session:
        after_commit(session, rooms.doorbell.ring)
        intake = validate_spec({"type": "import", **body.model_dump()}, rooms.catalog)
        return Submission(session, rooms.settings, rooms.catalog, caller).submit(intake)


@router.get("/{artifact_id}", summary="Show an artifact")
def get_artifact(artifact_id: str, caller: Reader, rooms: RoomsDep) -> ArtifactOut:
    """One artifact by its id."""
    with rooms.database.read() as session:
        return service.show(session, caller.project_id, artifact_id)


@router.patch("/{artifact_id}", summary="Tag an artifact")
def patch_artifact(artifact_id: str, body: ArtifactPatch, caller: Submitter, rooms: RoomsDep) -> ArtifactOut:
    """Sets its tags; what it is made of never changes."""
    with rooms.database.write() as session:
        return service.tag(session, caller.project_id, artifact_id, body.tags)


@router.delete("/{artifact_id}", summary="Delete an artifact")
def delete_artifact(artifact_id: str, caller: Submitter, rooms: RoomsDep) -> Deleted:
    """Its row and its bytes, for good; 409 while a deployment, a job, an alias or an adapter needs it."""
    with rooms.database.write() as session:
        service.delete(session, rooms.storage, caller, artifact_id)
    return Deleted(id=artifact_id, object="artifact")


@router.get("/{artifact_id}/files", summary="List an artifact's files")
def list_files(artifact_id: str, caller: Reader, rooms: RoomsDep) -> ArtifactFiles:
    """With their sizes and hashes, from its manifest."""
    with rooms.database.read() as session:
        return service.files(session, rooms.storage, caller.project_id, artifact_id)


@router.get("/{artifact_id}/files/{path:path}", summary="Download a file of an artifact", response_class=FileResponse)
def get_file(artifact_id: str, path: str, caller: Reader, rooms: RoomsDep) -> FileResponse:
    """One that the manifest lists, or `MANIFEST.json`; takes `Range`."""
    with rooms.database.read() as session:
        found = service.file(session, rooms.storage, caller.project_id, artifact_id, path)
    return FileResponse(found, media_type="application/octet-stream", filename=found.name)


@router.get("/{artifact_id}/certificate", summary="The proof of a merge")
def get_certificate(artifact_id: str, caller: Reader, rooms: RoomsDep) -> dict[str, Any]:
    """What the merge was held against before it was published; the manifest holds the hash of its file."""
    with rooms.database.read() as session:
        return service.certificate(session, rooms.storage, caller.project_id, artifact_id)


@router.get("/{artifact_id}/diagnosis", summary="What is wrong with it")
def get_diagnosis(artifact_id: str, caller: Reader, rooms: RoomsDep) -> diagnosis.Diagnosis:
    """Findings about the artifact, the job that made it and what that took, each with the patch to apply."""
    with rooms.database.read() as session:
        return diagnosis.of_artifact(session, rooms.settings, caller.project_id, artifact_id)


@router.get("/{artifact_id}/lineage", summary="Where it came from, and what became of it")
def get_lineage(artifact_id: str, caller: Reader, rooms: RoomsDep, direction: Direction = "both") -> Lineage:
    """A graph of artifacts, jobs, files and bases; also of an artifact that was deleted."""
    with rooms.database.read() as session:
        return lineage(session, caller.project_id, rooms.catalog, artifact_id, direction)


@router.get("/{artifact_id}/card", summary="Its model card", response_class=PlainTextResponse)
def get_card(artifact_id: str, caller: Reader, rooms: RoomsDep) -> PlainTextResponse:
    """Markdown, written from the record."""
    with rooms.database.read() as session:
        return PlainTextResponse(card.card(session, caller.project_id, artifact_id), media_type="text/markdown")


@router.post("/{artifact_id}/reproduce", status_code=201, summary="Make it again, and compare")
def reproduce_artifact(artifact_id: str, caller: Submitter, rooms: RoomsDep) -> JobOut:
    """Queues the run again with its resolved spec, inputs and seed; `result.reproduced` says whether it is the same."""
    with rooms.database.write() as session:
        after_commit(session, rooms.doorbell.ring)
        return reproduce(session, rooms.settings, rooms.catalog, caller, artifact_id)
