"""The checkpoints of a job on disk, over all its attempts: which stay, and what of them.

The two newest can be resumed. Of an older one the weights stay; optimizer, scheduler, RNG and trainer state go.
"""

import json
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.storage import COMPLETE, Storage

RESUMABLE = 2
_FOLDER = re.compile(r"checkpoint-(\d+)")
_ATTEMPT = re.compile(r"a(\d+)")


@dataclass(frozen=True)
class Committed:
    """A checkpoint with its COMPLETE.json."""

    folder: Path
    fence: int
    step: int
    resumable: bool
    score: float | None


def best_of(scores: Sequence[tuple[int, float | None]]) -> int | None:
    """The step with the lowest score, the earliest of equals; None where none was measured."""
    measured = [(score, step) for step, score in scores if score is not None]
    return min(measured)[1] if measured else None


def score_of(record: Mapping[str, Any]) -> float | None:
    """What a checkpoint is compared by, from its record or the line that announces it; lower is better."""
    metrics = record.get("metrics")
    value = record.get("score", metrics.get("eval_loss") if isinstance(metrics, dict) else None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def committed(job_dir: Path, fence: int) -> list[Committed]:
    """Those of an attempt and of the attempts before it, newest first."""
    found = [record for _, folder in _folders(job_dir, fence) if (record := _read(folder)) is not None]
    return sorted(found, key=lambda item: (item.fence, item.step), reverse=True)


def rotate(job_dir: Path, fence: int, keep: int | None) -> None:
    """Called by an attempt right after it committed a checkpoint: lets go of what nobody needs any more.

    ``keep``: how many stay, never fewer than two, and the best one besides; None = all.
    Of earlier attempts also goes what was never committed, what this one has written anew, and their scratch space.
    """
    found = committed(job_dir, fence)
    if not any(item.fence == fence for item in found):
        return  # nothing newer is safe yet
    known = {item.folder for item in found}
    for _, folder in _folders(job_dir, fence - 1):
        if folder not in known:
            shutil.rmtree(folder, ignore_errors=True)
    clear_scratch(job_dir, fence - 1)
    best = best_of([(item.step, item.score) for item in found])
    rank = 0
    floors: dict[int, int] = {}
    for item in found:
        floors[item.fence] = min(item.step, *(floors.values() or [item.step]))
        newer = [floor for number, floor in floors.items() if number > item.fence]
        # A later attempt began below it: this one was damaged, or its row was never written.
        abandoned = bool(newer) and item.step >= min(newer)
        rank += not abandoned
        if abandoned or (keep is not None and rank > max(keep, RESUMABLE) and item.step != best):
            _remove(item.folder)
        elif rank > RESUMABLE and item.resumable:
            Storage.thin_checkpoint(item.folder)
        elif not item.resumable:
            Storage.drop_trainer_state(item.folder)  # a crash may have left some


def clear_scratch(job_dir: Path, fence: int) -> None:
    """Deletes what an attempt and those before it were still working at: nobody can go on with it."""
    for _, attempt in _attempts(job_dir, fence):
        for scratch in (attempt / "work", *attempt.glob("out*.tmp")):
            shutil.rmtree(scratch, ignore_errors=True)


def unheard(job_dir: Path, fence: int, known: Collection[Path]) -> list[dict[str, Any]]:
    """Checkpoints of earlier attempts that are not ``known``, as the lines that announced them, oldest first.

    Whoever should have heard of them died; and the run may have rotated away all those that are known.
    """
    return [
        {
            "kind": "checkpoint",
            "path": str(item.folder),
            "step": item.step,
            "bytes": sum(entry["bytes"] for entry in record.get("files", {}).values()),
            **{name: record[name] for name in ("metrics", "score") if name in record},
        }
        for item in reversed(committed(job_dir, fence))
        if item.folder not in known and (record := Storage.checkpoint_record(item.folder))
    ]


def _remove(folder: Path) -> None:
    # First what makes it count, so that a half-deleted folder is never taken for a checkpoint.
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _attempts(job_dir: Path, fence: int) -> list[tuple[int, Path]]:
    return [
        (number, attempt)
        for attempt in (job_dir.iterdir() if job_dir.is_dir() else ())
        if (match := _ATTEMPT.fullmatch(attempt.name)) and (number := int(match[1])) <= fence
    ]


def _folders(job_dir: Path, fence: int) -> list[tuple[int, Path]]:
    return [
        (number, folder)
        for number, attempt in _attempts(job_dir, fence)
        for folder in (attempt / "ckpt").glob("checkpoint-*")
        if _FOLDER.fullmatch(folder.name) and folder.is_dir()
    ]


def _read(folder: Path) -> Committed | None:
    try:
        record: dict[str, Any] = json.loads((folder / COMPLETE).read_bytes())
        fence = int(folder.parent.parent.name[1:])
        return Committed(folder, fence, int(record["step"]), record.get("resumable", True) is True, score_of(record))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
