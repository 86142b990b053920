"""Checkpoints of runs as model names: ``<run>:ckpt-step-<N>``, loaded when somebody first asks for them."""

import re
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.artifacts import inspect
from app.db import Database
from app.deployments import hotload
from app.deployments.adapters import Looked, attach, nearest
from app.errors import Code, Conflict, NotFound
from app.jobs.live import SUFFIX
from app.models import Checkpoint, Deployment, Job
from app.settings import Settings
from app.states import AdapterState

_NAME = re.compile(r"^(?P<run>[A-Za-z0-9][A-Za-z0-9._-]{0,127}):ckpt-step-(?P<step>\d{1,9})$")


@dataclass(frozen=True)
class _Found:
    checkpoint: Checkpoint
    candidate: hotload.Candidate
    rank: int


def ask_for(database: Database, settings: Settings, project_id: str, model: str) -> Deployment | None:
    """Has a checkpoint loaded into a deployment of its base, which is returned; None: the name is no checkpoint's.

    ``run`` is an experiment's name (its newest run that has the step) or a job's id. Raises Conflict for one that no
    engine can load, NotFound while no deployment of its base runs.
    """
    found = _look(database, settings, project_id, model)
    if found is None:
        return None
    with database.write() as session:
        row = _home(session, project_id, model, found)
        attach(session, row, Looked(found.candidate, model, None), None, param="model")
    return row


def entry(database: Database, settings: Settings, project_id: str, model: str) -> dict[str, Any] | None:
    """As ``/v1/models`` shows one that can be asked and is not loaded. None and errors as ``ask_for``'s."""
    found = _look(database, settings, project_id, model)
    if found is None:
        return None
    with database.read() as session:
        row = _home(session, project_id, model, found)
    return {
        "id": model,
        "object": "model",
        "created": int(found.checkpoint.created_at.timestamp()),
        "owned_by": project_id,
        "root": found.checkpoint.job_id,
        "parent": row.name,
        # What a request brings back it also brings for the first time.
        "status": AdapterState.EVICTED,
    }


def _look(database: Database, settings: Settings, project_id: str, model: str) -> _Found | None:
    match = _NAME.match(model)
    if match is None:
        return None
    with database.read() as session:
        found = _checkpoint(session, project_id, match["run"], int(match["step"]))
        if found is None:
            return None
        folder = settings.data_dir / found.path
        if not folder.is_dir():
            raise NotFound(f"the files of {model} are gone", param="model", code=Code.MODEL_NOT_FOUND)
        where = f"GET /jobs/{found.job_id}/checkpoints tells its path below DATA_DIR"
        if not inspect.looks_like_adapter(folder):
            live = f"{match['run']}{SUFFIX}"
            hint = f"Deploy it as a model of its own ({where}), or ask {live} while the run trains."
            raise _not_servable(model, "it holds whole weights", hint)
        candidate = hotload.find(session, settings, project_id, str(folder), param="model")
    fault = hotload.fault(candidate)
    if fault is not None:
        raise _not_servable(model, fault, f"Merge it and deploy the result; {where}.")
    assert candidate.adapter.folder is not None
    return _Found(found, candidate, hotload.rank_of(candidate.adapter.folder))


def _not_servable(model: str, fault: str, hint: str) -> Conflict:
    return Conflict(
        f"{model} cannot be loaded into a running engine: {fault}",
        param="model",
        code=Code.ADAPTER_NOT_SERVABLE,
        hint=hint,
    )


def _home(session: Session, project_id: str, model: str, found: _Found) -> Deployment:
    row = nearest(session, project_id, found.candidate, found.rank)
    if row is None:
        raise NotFound(
            f"no deployment of {found.candidate.root.pinned} runs that could load {model}",
            param="model",
            code=Code.MODEL_NOT_FOUND,
            hint="Deploy that model: POST /deployments; its checkpoints then answer by their names.",
        )
    return row


def _checkpoint(session: Session, project_id: str, run: str, step: int) -> Checkpoint | None:
    return session.scalar(
        select(Checkpoint)
        .join(Job, Job.id == Checkpoint.job_id)
        .where(
            Job.project_id == project_id,
            (Job.experiment_name == run) | (Job.id == run),
            Job.type == "train",
            Checkpoint.step == step,
        )
        .order_by(Job.created_at.desc())
        .limit(1)
    )
