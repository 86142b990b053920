"""The view for people: relative symlinks under ``outputs/`` and ``models/``, derived from rows.

Nothing reads them back; they can be deleted and made again.
"""

import contextlib
import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import yaml
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.artifacts import repository
from app.db import Database
from app.models import DEFAULT_PROJECT, Artifact, Checkpoint, Job
from app.storage import COMPLETE, TRAINER_STATE, Storage

log = logging.getLogger(__name__)
_FOLDERS = {
    "adapter": "adapters",
    "reward": "adapters",
    "model": "merged_models",
    "report": "reports",
    "gguf": "gguf",
}
# Optimizer, scheduler and RNG state are for resuming; people look for weights.
_HIDDEN = (*TRAINER_STATE, COMPLETE)


def refresh_job(database: Database, storage: Storage, job_id: str) -> None:
    """Makes or mends the links of one job. Safe at any time, by anybody: a disk or database that refuses is logged."""
    try:
        _refresh(database, storage, job_id)
    except (OSError, SQLAlchemyError) as error:
        log.warning("the view of %s could not be made: %s", job_id, error)


def _refresh(database: Database, storage: Storage, job_id: str) -> None:
    with database.read() as session:
        job = session.get(Job, job_id)
        if job is None:
            return
        outputs = _outputs_dir(session, storage, job) if job.type == "train" else None
        artifacts = list(repository.of_job(session, job_id))
        checkpoints = list(session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id)))
    for artifact in artifacts:
        _link(link_of(storage, artifact), storage.artifact_dir(artifact.id))
    if outputs is None:
        return
    outputs.mkdir(parents=True, exist_ok=True)
    there = {f"checkpoint-{checkpoint.step}" for checkpoint in checkpoints}
    for folder in outputs.glob("checkpoint-*"):
        if folder.name not in there:
            shutil.rmtree(folder, ignore_errors=True)  # links alone
    for checkpoint in checkpoints:
        _link_checkpoint(outputs / f"checkpoint-{checkpoint.step}", storage.root / checkpoint.path)
    if artifacts:
        _link(outputs / "final_model", storage.artifact_dir(artifacts[-1].id))
    _write_config(outputs / "config_used.yaml", job.resolved_spec)
    _write_config(outputs / "config_submitted.yaml", job.spec)
    log = storage.attempt_dir(job.id, job.fence) / "trainer_log.jsonl"
    if log.exists():
        _link(outputs / "trainer_log.jsonl", log)
    for name in job.resolved_spec.get("trackers") or ():
        kept = storage.job_dir(job.id) / name
        if kept.is_dir():
            _link(outputs / name, kept)


def outputs_of(session: Session, storage: Storage, job: Job) -> Path:
    """The folder that people find a training run in."""
    return _outputs_dir(session, storage, job)


def _people(storage: Storage, project_id: str) -> Path:
    return storage.root if project_id == DEFAULT_PROJECT else storage.root / "projects" / project_id


def _outputs_dir(session: Session, storage: Storage, job: Job) -> Path:
    """A name used again gets ``_v2``, ``_v3`` …: never an overwrite."""
    earlier = session.scalar(
        select(func.count())
        .select_from(Job)
        .where(
            Job.project_id == job.project_id,
            Job.type == "train",
            Job.experiment_name == job.experiment_name,
            (Job.created_at < job.created_at) | ((Job.created_at == job.created_at) & (Job.id < job.id)),
        )
    )
    name = job.experiment_name if not earlier else f"{job.experiment_name}_v{earlier + 1}"
    return _people(storage, job.project_id) / "outputs" / name


def forget(link: Path) -> None:
    """Takes the link of a deleted artifact away; one that cannot be is logged."""
    try:
        link.unlink(missing_ok=True)
    except OSError as error:
        log.warning("the link %s cannot be taken away: %s", link.name, error)


def link_of(storage: Storage, artifact: Artifact) -> Path:
    """Where people find an artifact."""
    folder = _FOLDERS[artifact.kind]
    if artifact.kind == "model" and artifact.facts.get("imported"):
        folder = "base_models"
    name = (
        artifact.name if folder == "base_models" and artifact.version == 1 else f"{artifact.name}_v{artifact.version}"
    )
    return _people(storage, artifact.project_id) / "models" / folder / name


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    wanted = os.path.relpath(target, link.parent)
    with contextlib.suppress(OSError):
        if os.readlink(link) == wanted:
            return
    temporary = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
    temporary.symlink_to(wanted)
    os.replace(temporary, link)


def _link_checkpoint(folder: Path, source: Path) -> None:
    if not source.is_dir():  # rotated away
        shutil.rmtree(folder, ignore_errors=True)
        return
    folder.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith(_HIDDEN):
            _link(folder / path.name, path)


def _write_config(path: Path, spec: dict[str, Any]) -> None:
    text = yaml.safe_dump(spec, sort_keys=False, allow_unicode=True)
    if not path.exists() or path.read_text() != text:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        temporary.write_text(text)
        os.replace(temporary, path)
