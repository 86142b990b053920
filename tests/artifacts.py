"""Artifacts that no job left: their bytes published, their rows added."""

import shutil
from pathlib import Path
from typing import Any

from app.db import Database
from app.models import DEFAULT_PROJECT, Artifact, new_id
from app.projects.repository import ensure_default
from app.storage import Storage


def publish(
    database: Database, storage: Storage, folder: Path, name: str, kind: str, *, version: int = 1, **facts: Any
) -> str:
    """A copy of the folder as an artifact of the default project; its id. ``base``: what an adapter was trained on."""
    artifact_id = new_id("art")
    copy = storage.root / "incoming" / artifact_id
    shutil.copytree(folder, copy)
    published = storage.publish(copy, artifact_id, {})
    base = str(facts.get("base", ""))
    with database.write() as session:
        ensure_default(session)
        session.add(
            Artifact(
                id=artifact_id,
                project_id=DEFAULT_PROJECT,
                name=name,
                version=version,
                kind=kind,
                bytes=published.bytes,
                sha256=published.sha256,
                base_chain=facts.pop("base_chain", [base, "sft:job"] if base else [f"artifact:{artifact_id}"]),
                base_artifact_id=base.removeprefix("artifact:") if base.startswith("artifact:") else None,
                facts=facts,
            )
        )
    return artifact_id
