"""What can be done with artifacts: look at them, read their files, tag them, delete them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from app.aliases import repository as aliases
from app.artifacts import repository, view
from app.artifacts.schemas import ArtifactFile, ArtifactFiles, ArtifactOut
from app.db import after_commit
from app.errors import Code, Conflict, NotFound
from app.models import Artifact
from app.paging import Page, page_of
from app.projects.caller import Caller
from app.storage import CERTIFICATE, MANIFEST, Storage


def show(session: Session, project_id: str, artifact_id: str) -> ArtifactOut:
    """One artifact. Raises NotFound."""
    return _shown(session, [existing(session, project_id, artifact_id)])[0]


def listing(
    session: Session,
    project_id: str,
    limit: int,
    after: str | None,
    kind: str | None,
    name: str | None,
    tag: str | None = None,
) -> Page[ArtifactOut]:
    """Newest first."""
    cursor = existing(session, project_id, after, "after") if after else None
    filters = [Artifact.kind == kind] if kind else []
    filters += [Artifact.name == name] if name else []
    filters += [repository.has_tag(tag)] if tag else []
    rows = repository.page(session, project_id, limit, cursor, filters)
    return page_of(_shown(session, rows), limit, [row.id for row in rows])


def files(session: Session, storage: Storage, project_id: str, artifact_id: str) -> ArtifactFiles:
    """What its manifest lists. Raises NotFound."""
    existing(session, project_id, artifact_id)
    entries = _manifest(storage, artifact_id)
    return ArtifactFiles(
        data=[ArtifactFile(path=name, bytes=entries[name]["bytes"], sha256=entries[name]["sha256"]) for name in entries]
    )


def file(session: Session, storage: Storage, project_id: str, artifact_id: str, path: str) -> Path:
    """Where a file of an artifact lies. Raises NotFound; only what the manifest lists can be named."""
    existing(session, project_id, artifact_id)
    if path != MANIFEST and path not in _manifest(storage, artifact_id):
        raise NotFound(
            f"{artifact_id} has no file {path[:200]!r}", param="path", hint=f"GET /artifacts/{artifact_id}/files."
        )
    return storage.artifact_dir(artifact_id) / path


def certificate(session: Session, storage: Storage, project_id: str, artifact_id: str) -> dict[str, Any]:
    """The certificate of a merged model or an exported file. Raises NotFound for other artifacts."""
    row = existing(session, project_id, artifact_id)
    try:
        found: dict[str, Any] = json.loads((storage.artifact_dir(artifact_id) / CERTIFICATE).read_bytes())
    except (OSError, ValueError) as error:
        raise NotFound(
            f"{row.name}:v{row.version} has no certificate",
            param="artifact_id",
            hint="Models that a job of type merge made, and files of an export, have one.",
        ) from error
    return found


def tag(session: Session, project_id: str, artifact_id: str, tags: Sequence[str]) -> ArtifactOut:
    """Puts these tags in the place of those before. Raises NotFound."""
    row = existing(session, project_id, artifact_id)
    repository.set_tags(session, row.id, tags)
    return _shown(session, [row])[0]


def delete(session: Session, storage: Storage, caller: Caller, artifact_id: str) -> None:
    """Takes an artifact away for good. Raises NotFound, and Conflict while something needs it.

    The row goes first; should the process die before the bytes, they are collected as garbage.
    """
    row = existing(session, caller.project_id, artifact_id)
    users = repository.users(session, row)
    if users:
        more = f" and {len(users) - 5} more" if len(users) > 5 else ""
        raise Conflict(
            f"{row.name}:v{row.version} is in use by {', '.join(users[:5])}{more}",
            param="artifact_id",
            code=Code.IN_USE,
            hint="Stop the deployment, cancel the job, move the alias, or delete what was trained on it first.",
        )
    link = view.link_of(storage, row)
    repository.delete_row(session, row, caller.key_id)
    after_commit(session, lambda: view.forget(link))
    after_commit(session, lambda: storage.remove_artifact(artifact_id))


def existing(session: Session, project_id: str, artifact_id: str, param: str = "artifact_id") -> Artifact:
    """An artifact's row. Raises NotFound."""
    row = repository.get(session, project_id, artifact_id)
    if row is None:
        gone = repository.tombstone(session, project_id, artifact_id)
        raise NotFound(
            f"{artifact_id} was deleted on {gone.deleted_at:%Y-%m-%d}"
            if gone
            else f"there is no artifact {artifact_id}",
            param=param,
            hint="GET /artifacts lists what there is.",
        )
    return row


def _shown(session: Session, rows: Sequence[Artifact]) -> list[ArtifactOut]:
    ids = [row.id for row in rows]
    named, tagged = aliases.of_artifacts(session, ids), repository.tags_of(session, ids)
    return [ArtifactOut.of(row, named.get(row.id, ()), tagged.get(row.id, ())) for row in rows]


def _manifest(storage: Storage, artifact_id: str) -> dict[str, dict[str, str | int]]:
    try:
        entries: dict[str, dict[str, str | int]] = json.loads(
            (storage.artifact_dir(artifact_id) / MANIFEST).read_bytes()
        )["files"]
    except (OSError, ValueError, KeyError) as error:
        raise NotFound(
            f"the files of {artifact_id} cannot be read: {type(error).__name__}",
            param="artifact_id",
            hint="Restore DATA_DIR/artifacts from a backup (docs/operate.md).",
        ) from error
    return entries
