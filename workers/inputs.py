"""From a job's row to ``attempt.json``: its references followed to folders, as they are at this moment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy.orm import Session

from app.artifacts import card, references
from app.catalog import Catalog
from app.errors import AppError, Code, RunError
from app.jobs import bases, room
from app.jobs.live import live_socket
from app.models import Checkpoint, Job
from app.settings import Settings
from app.specs import JobSpec
from app.storage import Storage


def attempt_spec(catalog: Catalog, job: Job) -> JobSpec:
    """The job's spec as this worker understands it. Raises RunError bad_spec."""
    spec_class = catalog.spec_class(job.type, job.algorithm)
    if spec_class is None:
        raise RunError(Code.BAD_SPEC, f"this worker does not know {job.algorithm or job.type}")
    try:
        return spec_class.model_validate(job.resolved_spec)
    except ValidationError as error:
        raise RunError(
            Code.BAD_SPEC, f"this worker cannot read the spec: {error}", hint="Are API and worker of one version?"
        ) from error


def attempt_file(session: Session, settings: Settings, catalog: Catalog, job: Job) -> dict[str, Any]:
    """What the runner needs to know. Raises RunError when an input is gone or the plug is unknown here."""
    spec = attempt_spec(catalog, job)
    inputs: dict[str, dict[str, Any]] = {}
    for path, kind, value in references.references(spec):
        if kind == "file":
            inputs[path] = {"path": str(Storage(settings.data_dir).file_path(value)), "file_id": value}
            continue
        found = _follow(session, settings, job.project_id, value, path)
        inputs[path] = _entry(found, bases.wants_plain(job.type, path))
        operation = catalog.operations.get(job.type)
        if operation is not None and operation.wants_card and found.artifact is not None:
            inputs[path]["card"] = card.card(session, job.project_id, found.artifact.id)
        root, between = _chain(session, settings, job.project_id, found, path)
        if root is not found:
            inputs[path]["under"] = [str(layer.folder) for layer in between]
            inputs[f"{path}.base"] = _entry(root, bases.wants_plain(job.type, f"{path}.base"))
            if job.type != "train":
                inputs.setdefault("base_model", inputs[f"{path}.base"])
    return {
        "job_id": job.id,
        "stage": "prepare" if job.next_class else "run",
        "type": job.type,
        "algorithm": job.algorithm,
        "gpus": job.gpus,
        "run_seconds": job.run_seconds,
        "memory_gb": job.memory_gb,
        "task_folder": str(settings.eval_tasks) if settings.eval_tasks else None,
        "reserve_bytes": room.reserve_bytes(settings),
        "spec": job.resolved_spec,
        "inputs": inputs,
        "packages": list(settings.packages),
        "interpreters": {"quantize": str(python)} if (python := settings.quantizer_python) else {},
        "live_socket": str(live_socket(settings, job.id)) if job.type == "train" and not job.next_class else None,
    }


def resume_point(storage: Storage, checkpoints: Sequence[Checkpoint]) -> tuple[Path | None, list[tuple[int, str]]]:
    """The newest checkpoint whose every byte verifies, and those that do not: ``(step, file)``. Reads them whole."""
    rejected: list[tuple[int, str]] = []
    for checkpoint in checkpoints:
        folder = storage.root / checkpoint.path
        if storage.checkpoint_record(folder).get("resumable") is False:
            continue  # its weights alone are left, as they should be
        faults = storage.checkpoint_faults(folder)
        if not faults:
            return folder, rejected
        rejected.append((checkpoint.step, faults[0]))
    return None, rejected


def follow_model(session: Session, settings: Settings, job: Job, value: str, param: str) -> references.Resolved:
    """One model reference of a job. Raises RunError."""
    return _follow(session, settings, job.project_id, value, param)


def _follow(session: Session, settings: Settings, project_id: str, value: str, param: str) -> references.Resolved:
    try:
        found = references.resolve(session, settings, project_id, value, param=param)
    except AppError as error:
        raise RunError(Code.MODEL_NOT_FOUND, error.message, hint=error.hint, param=param) from error
    if found.job_id is not None:
        raise RunError(Code.MODEL_NOT_FOUND, f"{found.job_id} left no model", param=param)
    return found


def _chain(
    session: Session, settings: Settings, project_id: str, found: references.Resolved, param: str
) -> tuple[references.Resolved, list[references.Resolved]]:
    try:
        return references.chain_of(session, settings, project_id, found, param=param)
    except AppError as error:
        raise RunError(Code.MODEL_NOT_FOUND, error.message, hint=error.hint, param=param) from error


def _entry(found: references.Resolved, plain: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {**found.facts, "pinned": found.pinned}
    if found.folder is not None:
        entry["path"] = str(found.folder)
    if found.hub is not None:
        entry |= {"hub": found.hub, "revision": found.revision, "plain": plain}
    return entry
