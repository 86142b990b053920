"""Room on disk for a job: what it will write, and which held jobs there is room for again."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import disk
from app.artifacts import inspect
from app.errors import AppError
from app.jobs import estimate, repository
from app.jobs.repository import Move
from app.models import Job, JobEvent
from app.settings import Settings
from app.specs import JobSpec, TrainSpec
from app.states import JobState

DISK_FULL = "disk_full"
HELD = f"hold_{DISK_FULL}"
_AT_ONCE = 100
_SHARE = 0.05
_MOST = 2_000_000_000
_FLOAT32 = 4
# Adam's two moments in float32.
_MOMENTS = 8


@dataclass(frozen=True)
class Shortage:
    """A job that does not fit: bytes that must be free, and bytes that are."""

    needed: int
    free: int

    @property
    def message(self) -> str:
        """For the job's history."""
        return (
            f"The job needs {_amount(self.needed)} of free disk and there are {_amount(self.free)}; "
            "it starts by itself once there is room."
        )


def reserve_bytes(settings: Settings) -> int:
    """What a start must leave free: 5 % of the file system, 2 GB at most, unless an operator says otherwise."""
    if settings.disk_reserve_bytes is not None:
        return settings.disk_reserve_bytes
    return min(int(shutil.disk_usage(settings.data_dir).total * _SHARE), _MOST)


def shortage(
    settings: Settings, spec: JobSpec, inputs: Mapping[str, Mapping[str, Any]], kept: Path | None = None
) -> Shortage | None:
    """What is missing for a job to start: two checkpoints, its output and the reserve. None when it fits.

    ``kept``: the folder with what an earlier attempt has written of that already.
    """
    written = _size(kept) if kept is not None and kept.is_dir() else 0
    needed = max(0, to_write(spec, inputs) - written) + reserve_bytes(settings)
    free = disk.free_bytes(settings.data_dir)
    return Shortage(needed, free) if free < needed else None


def to_write(spec: JobSpec, inputs: Mapping[str, Mapping[str, Any]]) -> int:
    """Bytes that a job will write at most at one time; 0 where its inputs are not here yet or cannot be read."""
    try:
        if isinstance(spec, TrainSpec):
            return _training(spec, _folder(inputs, "model.model_name_or_path.base", "model.model_name_or_path"))
        if spec.type == "merge":
            return _size(_folder(inputs, "base_model", "adapter.base"))
        if spec.type == "import":
            return _size(_folder(inputs, "source", "model"))
    except (AppError, OSError):
        return 0
    return 0


def _training(spec: TrainSpec, base: Path | None) -> int:
    shapes = inspect.tensor_shapes(base, "model") if base is not None else {}
    if spec.model.method == "full":
        parameters = sum(math.prod(shape) for shape in shapes.values())
        weights = _size(base)
        return 2 * (weights + parameters * _MOMENTS) + weights
    config = inspect.read_json(base / "config.json", "model") if base is not None else {}
    adapter = int(estimate.trained(spec, shapes, config)[0]) * _FLOAT32
    # What begins with a part of the base is stored at twice its rank.
    doubled = spec.model.peft_config is not None and spec.model.peft_config.moves_base
    return 2 * 4 * adapter + adapter * (2 if doubled else 1)


def _folder(inputs: Mapping[str, Mapping[str, Any]], *fields: str) -> Path | None:
    found = (inputs[field].get("path") for field in fields if field in inputs)
    return next((Path(path) for path in found if path), None)


def _size(folder: Path | None) -> int:
    if folder is None:
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def held(session: Session) -> bool:
    """Whether any job waits for room."""
    return session.scalar(select(Job.id).where(*_waiting()).limit(1)) is not None


def release(session: Session, settings: Settings) -> int:
    """Ends the holds of jobs that there is room for again; how many.

    A job that found the disk full while it ran waits for twice the reserve, so that it does not go up and down with it.
    """
    free, files = disk.free_bytes(settings.data_dir), disk.free_files(settings.data_dir)
    least = 2 * reserve_bytes(settings)
    released = 0
    for job_id in session.scalars(select(Job.id).where(*_waiting()).order_by(Job.created_at).limit(_AT_ONCE)).all():
        latest = session.scalar(
            select(JobEvent.data)
            .where(JobEvent.job_id == job_id, JobEvent.code == HELD)
            .order_by(JobEvent.seq.desc())
            .limit(1)
        )
        needed, inodes = ((latest or {}).get(name) for name in ("needed_bytes", "needed_files"))
        if free < (needed if isinstance(needed, int) else least) or files < (inodes or 0):
            continue
        values = {"hold_reason": None, "not_before": None, "delay_seconds": 0.0}
        move = Move(JobState.QUEUED, "hold_released", "There is room on the disk again.", values=values)
        released += repository.note(session, job_id, move, *_waiting())
    return released


def _waiting() -> tuple[Any, ...]:
    return (Job.state == JobState.QUEUED, Job.hold_reason == DISK_FULL)


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
