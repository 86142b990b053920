"""Where bytes live on disk, and how a finished folder becomes visible at once.

``publish`` writes ``MANIFEST.json``, fsyncs everything and renames the folder into place; the database row that
follows is what makes it exist. A folder that no row points to is garbage.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app import disk
from app.crashpoints import reached
from app.errors import Code, RunError

MANIFEST = "MANIFEST.json"
COMPLETE = "COMPLETE.json"
CERTIFICATE = "certificate.json"
# In a job's folder, beside its attempts: what one of them left for the next.
KEPT = "kept"
# What a run needs to go on and nobody else looks at; names in a checkpoint begin so.
TRAINER_STATE = ("optimizer", "scheduler", "scaler", "rng_state", "training_args", "trainer_state", "run_state")
_CHUNK = 4 << 20


@dataclass(frozen=True)
class Published:
    """What a manifest says: total size in bytes, and the sha256 of the manifest itself."""

    bytes: int
    sha256: str


class Storage:
    """The folders under DATA_DIR."""

    def __init__(self, data_dir: Path) -> None:
        self.root = data_dir

    def attempt_dir(self, job_id: str, fence: int) -> Path:
        """Where one attempt of a job works; only that attempt writes here."""
        return self.root / "jobs" / job_id / f"a{fence}"

    def job_dir(self, job_id: str) -> Path:
        """All attempts of a job."""
        return self.root / "jobs" / job_id

    def artifact_dir(self, artifact_id: str) -> Path:
        """An artifact's bytes."""
        return self.root / "artifacts" / artifact_id

    def file_path(self, file_id: str) -> Path:
        """An uploaded file's bytes."""
        return self.root / "files" / file_id

    def publish(
        self, source: Path, artifact_id: str, facts: Mapping[str, Any], hashed: Mapping[str, str] | None = None
    ) -> Published:
        """Moves ``source`` to its place as an artifact, durably and all at once.

        ``hashed``: sha256 of files that are on disk already and were hashed as they were written.

        Raises RunError (storage_error) when the folder is empty or holds anything but regular files.
        """
        entries: dict[str, dict[str, Any]] = {}
        for path in _regular_files(source):
            if path.parent == source and path.name in (MANIFEST, COMPLETE):
                continue  # of an artifact that this one is a copy of; ours is written over it
            name = path.relative_to(source).as_posix()
            digest = (hashed or {}).get(name) or _hash_and_sync(path)
            entries[name] = {"bytes": path.stat().st_size, "sha256": digest}
        if not entries:
            raise RunError(Code.STORAGE_ERROR, f"the run left nothing in {source.name}")
        reached("publish.before_manifest")
        manifest = json.dumps({**facts, "files": entries}, indent=1, sort_keys=True).encode()
        _write_durably(source / MANIFEST, manifest)
        for folder in [path for path in source.rglob("*") if path.is_dir()] + [source]:
            sync_dir(folder)
        target = self.artifact_dir(artifact_id)
        target.parent.mkdir(parents=True, exist_ok=True)
        reached("publish.before_rename")
        os.rename(source, target)
        reached("publish.after_rename")
        sync_dir(target.parent)
        return Published(sum(entry["bytes"] for entry in entries.values()), hashlib.sha256(manifest).hexdigest())

    def remove_artifact(self, artifact_id: str) -> None:
        """Deletes an artifact's bytes, when its row is gone. What cannot be deleted now is left to the collector."""
        shutil.rmtree(self.artifact_dir(artifact_id), ignore_errors=True)

    def verify(self, artifact_id: str, *, read: bool = True, sha256: str | None = None) -> list[str]:
        """Names of files that are missing, were added, or differ from the manifest; without ``read`` by sizes alone.

        ``sha256``: what the manifest's own hash was. The manifest alone is named where it is not whole itself.
        """
        folder = self.artifact_dir(artifact_id)
        try:
            manifest = (folder / MANIFEST).read_bytes()
            entries = json.loads(manifest)["files"]
            faults = [name for name, entry in entries.items() if not _is_whole(folder / name, entry, read=read)]
            added = [name for name in _names(folder) if name not in (MANIFEST, COMPLETE, *entries)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [MANIFEST]
        if sha256 is not None and hashlib.sha256(manifest).hexdigest() != sha256:
            return [MANIFEST]
        return faults + added

    @staticmethod
    def commit_checkpoint(
        folder: Path, step: int, metrics: Mapping[str, float | None] | None = None, score: float | None = None
    ) -> int:
        """Makes a checkpoint durable and says so in COMPLETE.json, written last. Returns its size in bytes.

        ``score``: by which checkpoints are compared; lower is better, None = not measured.
        """
        entries: dict[str, dict[str, Any]] = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _hash_and_sync(path)}
            for path in _regular_files(folder)
            if path.name != COMPLETE
        }
        for inner in (path for path in folder.rglob("*") if path.is_dir()):
            sync_dir(inner)
        sync_dir(folder)
        reached("checkpoint.before_complete")
        record = {
            "step": step,
            "files": entries,
            "metrics": dict(metrics or {}),
            "score": score,
            "resumable": True,
        }
        write_private(folder / COMPLETE, json.dumps(record, sort_keys=True).encode())
        sync_dir(folder)
        sync_dir(folder.parent)
        reached("checkpoint.after_complete")
        return sum(entry["bytes"] for entry in entries.values())

    @staticmethod
    def thin_checkpoint(folder: Path) -> None:
        """Leaves weights, config, tokenizer; COMPLETE.json says so first, so that a crash leaves at most too much."""
        record = json.loads((folder / COMPLETE).read_bytes())
        kept = {name: entry for name, entry in record["files"].items() if not name.startswith(TRAINER_STATE)}
        record |= {"files": kept, "resumable": False}
        write_private(folder / COMPLETE, json.dumps(record, sort_keys=True).encode())
        sync_dir(folder)
        reached("checkpoint.thinned")
        Storage.drop_trainer_state(folder)

    @staticmethod
    def drop_trainer_state(folder: Path) -> None:
        """Deletes what only a resume would read."""
        for path in folder.iterdir():
            if path.name.startswith(TRAINER_STATE):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    @staticmethod
    def checkpoint_record(folder: Path) -> dict[str, Any]:
        """What COMPLETE.json says: ``step``, ``files``, ``metrics``, ``resumable``; empty without a readable one."""
        try:
            record = json.loads((folder / COMPLETE).read_bytes())
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    @staticmethod
    def checkpoint_faults(folder: Path) -> list[str]:
        """Names of files that are not as they were committed; of a thinned checkpoint those that should be left."""
        try:
            entries = json.loads((folder / COMPLETE).read_bytes())["files"]
            return [name for name, entry in entries.items() if not _is_whole(folder / name, entry)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [COMPLETE]

    def free_bytes(self) -> int:
        """Room left for new work."""
        return disk.free_bytes(self.root)


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_dir(folder: Path) -> None:
    """Makes names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_private(path: Path, data: bytes) -> None:
    """A file that only we can read, whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    os.rename(temporary, path)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _hash_and_sync(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        os.fsync(file.fileno())
    return digest.hexdigest()


def _is_whole(path: Path, entry: Mapping[str, Any], *, read: bool = True) -> bool:
    sized = path.is_file() and not path.is_symlink() and path.stat().st_size == entry["bytes"]
    return sized and (not read or bool(sha256_of(path) == entry["sha256"]))


def _names(folder: Path) -> Iterator[str]:
    """Of all that lies there but folders; what begins with a dot no library reads, and file systems leave there."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if (path.is_symlink() or not path.is_dir()) and not any(part.startswith(".") for part in relative.parts):
            yield relative.as_posix()


def _regular_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise RunError(Code.STORAGE_ERROR, f"{path.name} is neither a file nor a folder")
        if path.is_file():
            yield path
