"""A new job that goes on from another's checkpoint: the same run, with more steps or another pace."""

import math
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.errors import BadRequest, Code, Conflict, NotFound
from app.models import Checkpoint, File, Job
from app.specs import TrainSpec
from app.storage import Storage

FIELD = "from_checkpoint"
_SAME = ("algorithm", "model", "dataset")
# What hardware settles, whatever the spec says.
_BY_HARDWARE = {"dtype", "bnb_4bit_compute_dtype"}


def checkpoint_of(session: Session, project_id: str, checkpoint_id: str) -> tuple[Checkpoint, Job] | None:
    """A checkpoint of the project, and the job that left it."""
    query = (
        select(Checkpoint, Job)
        .join(Job, Job.id == Checkpoint.job_id)
        .where(Checkpoint.id == checkpoint_id, Job.project_id == project_id)
    )
    row = session.execute(query).one_or_none()
    return (row[0], row[1]) if row is not None else None


def check(session: Session, storage: Storage, project_id: str, spec: TrainSpec, resolved: dict[str, Any]) -> None:
    """Refuses a checkpoint that this spec cannot go on from. Raises NotFound, Conflict, BadRequest."""
    assert spec.from_checkpoint is not None
    found = checkpoint_of(session, project_id, spec.from_checkpoint)
    if found is None:
        raise NotFound(
            f"there is no checkpoint {spec.from_checkpoint}",
            param=FIELD,
            hint="GET /jobs/{id}/checkpoints lists those of a job.",
        )
    checkpoint, job = found
    if storage.checkpoint_record(storage.root / checkpoint.path).get("resumable") is not True:
        raise Conflict(
            f"of the checkpoint at step {checkpoint.step} only the weights are left",
            param=FIELD,
            code=Code.WRONG_STATE,
            hint="A run goes on from its two newest checkpoints; or start a run from its artifact.",
        )
    for name in _SAME:
        if not _agree(resolved[name], job.resolved_spec.get(name)):
            raise BadRequest(
                f"{name} is not that of {job.id}, so its checkpoint does not fit",
                param=name,
                code=Code.CONFLICTING_FIELDS,
                hint=f"Take {name} from GET /jobs/{job.id}; to train on with other data, start from its artifact.",
            )
    if spec.resources.gpus != job.gpus:
        raise BadRequest(
            f"the checkpoint is of a run on {job.gpus} GPUs, each with its own place in the data",
            param="resources.gpus",
            code=Code.CONFLICTING_FIELDS,
            hint=f"Set resources.gpus to {job.gpus}, or start from its artifact.",
        )
    steps = _steps(session, spec)
    if steps is not None and steps <= checkpoint.step:
        field = "max_steps" if spec.training.max_steps else "num_train_epochs"
        raise BadRequest(
            f"the checkpoint is at step {checkpoint.step}, and this run ends at {steps}: no steps are left",
            param=f"training.{field}",
            code=Code.CONFLICTING_FIELDS,
            hint=f"Raise training.{field}; it counts from the first step of the run that is continued.",
        )


def _agree(new: Any, old: Any) -> bool:
    if not (isinstance(new, dict) and isinstance(old, dict)):
        return bool(new == old)
    return new.keys() == old.keys() and all(_settled(name, new[name]) or _agree(new[name], old[name]) for name in new)


def _settled(name: str, value: Any) -> bool:
    """Whether the run settles it by itself: the hardware, or where the spec leaves it open or gives a preset."""
    preset = name == "target_modules" and isinstance(value, str)
    return name in _BY_HARDWARE or preset or (name == "eval_split" and value is None)


def _steps(session: Session, spec: TrainSpec) -> int | None:
    """Where the run will end, counted from step 0; None when the number of rows is not known."""
    if spec.training.max_steps is not None:
        return spec.training.max_steps
    rows = session.scalar(select(File.rows).where(File.id == spec.dataset.file))
    if rows is None:
        return None
    block = spec.training
    batches = math.ceil(rows / block.per_device_train_batch_size)
    return math.ceil(block.num_train_epochs * max(1, math.ceil(batches / block.gradient_accumulation_steps)))
