"""Between folders of this machine and what the service keeps: a path becomes a reference, an artifact a folder."""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from app.client import Client, ServiceError
from app.commands.show import err, fail, finished
from app.settings import Settings
from app.storage import MANIFEST, Storage, sha256_of

Kind = Literal["model", "adapter"]

_MARKS = ("/", "./", "../", "~")


def as_path(value: str | None, folder: Path = Path()) -> Path | None:
    """The path that a value is, relative to ``folder``; None for names, ids and hub repositories.

    ``outputs/run/final_model`` is one too where it leads to something.
    """
    if not value:
        return None
    path = folder / Path(value).expanduser()
    if value.startswith(_MARKS) or value in (".", ".."):
        return path
    return path if "/" in value and not value.startswith("hub:") and path.exists() else None


def readable(paths: Iterable[Path | None]) -> list[Path]:
    """Those outside DATA_DIR, which a service started for this command must be allowed to read.

    Exits 1 for one that leads nowhere, before anything is started.
    """
    settings = Settings()
    given = [path for path in paths if path is not None]
    for path in given:
        if not path.exists() and not settings.url:
            fail(f"there is nothing at {path}", "A hub id looks like org/name, a registered name has no slash.")
    found = [path.resolve() for path in given]
    return [path for path in found if not path.is_relative_to(settings.data_dir)]


def reference(client: Client, value: str, folder: Path = Path()) -> str:
    """What a spec says for a value of the command line.

    An artifact in DATA_DIR, or an untouched copy of one, is named by its id; another folder outside the model roots is
    imported, where the service is our own. The rest is for the service to judge.
    """
    path = as_path(value, folder)
    if path is None:
        return value
    settings, real = Settings(), path.resolve()
    if real.parent == settings.data_dir / "artifacts":
        return f"artifact:{real.name}"
    if real.is_relative_to(settings.data_dir):
        return str(path.absolute())
    if artifact := copy_of(client, real):
        return f"artifact:{artifact}"
    if not client.embedded or any(real.is_relative_to(root) for root in settings.model_roots):
        return str(real)
    return f"artifact:{_imported(client, real)}"


def copy_of(client: Client, folder: Path) -> str | None:
    """The id of the artifact that a folder is a copy of, byte for byte; None for any other folder."""
    try:
        manifest = (folder / MANIFEST).read_bytes()
        record: dict[str, Any] = json.loads(manifest)
        entries: dict[str, dict[str, Any]] = record["files"]
        ids = client.call("GET", f"/jobs/{record['job_id']}")["artifact_ids"]
        artifacts = [client.call("GET", f"/artifacts/{artifact_id}") for artifact_id in ids]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    except ServiceError as error:
        if error.status == 404:
            return None
        raise
    digest = hashlib.sha256(manifest).hexdigest()
    found = next((artifact["id"] for artifact in artifacts if artifact["sha256"] == digest), None)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    if found is None or names != set(entries):
        return None
    whole = all(sha256_of(folder / name) == entry["sha256"] for name, entry in entries.items())
    return str(found) if whole else None


def _imported(client: Client, folder: Path) -> str:
    """The artifact that a folder was imported as, now or before, as long as nothing in it has changed."""
    known = client.call("GET", "/jobs", params={"type": "import", "metadata[source]": _state_of(folder), "limit": 50})
    for job in known["data"]:
        if job["status"] == "succeeded" and _is_there(client, job["artifact_ids"][0]):
            return str(job["artifact_ids"][0])
    kind, name = kind_of(folder), name_of(folder)
    err.print(f"{folder} is imported as {name}", markup=False, style="dim")
    spec = {"type": "import", "path": str(folder), "name": name, "kind": kind}
    job = client.submit({**spec, "metadata": {"source": _state_of(folder)}})
    for _ in client.follow(job["id"]):
        pass
    job = client.call("GET", f"/jobs/{job['id']}")
    finished(client, job)
    return str(job["artifact_ids"][0])


def kind_of(folder: Path) -> Kind:
    """What lies there by its files."""
    return "adapter" if (folder / "adapter_config.json").exists() else "model"


def _state_of(folder: Path) -> str:
    """Changes with the folder's place, and with the name, size or time of anything in it."""
    files = [folder] if folder.is_file() else sorted(path for path in folder.iterdir() if path.is_file())
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((str(folder), facts)).encode()).hexdigest()


def _is_there(client: Client, artifact_id: str) -> bool:
    try:
        client.call("GET", f"/artifacts/{artifact_id}")
    except ServiceError as error:
        if error.status != 404:
            raise
        return False
    return True


def name_of(folder: Path) -> str:
    """A folder's name in the letters that a name in the registry may have."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).lstrip("._-")
    return plain[:63] or "imported"


def link_outputs(folder: Path = Path()) -> None:
    """Makes ``outputs`` a link to where the service shows what runs left; one that is there already stays."""
    link, settings = folder / "outputs", Settings()
    target = settings.data_dir / "outputs"
    if settings.url:
        return
    with contextlib.suppress(FileExistsError):
        link.symlink_to(target)
    if link.resolve() != target.resolve():
        err.print(f"{link} is something else; the outputs lie in {target}", markup=False)


def check_free(client: Client, target: Path) -> None:
    """Refuses a target that holds what would be lost; an untouched copy of an artifact may be replaced."""
    if target.resolve().is_relative_to(Settings().data_dir):
        fail(f"{target} lies in the data directory, which is the service's own", "Name a folder elsewhere.")
    if target.is_dir() and not target.is_symlink() and (not any(target.iterdir()) or copy_of(client, target)):
        return
    if os.path.lexists(target):
        fail(f"{target} exists already", "Name another --output-path, or move it away: nothing is overwritten.")


def copy_out(artifact_id: str, target: Path) -> None:
    """Copies an artifact to where the caller wants it; it appears whole or not at all."""
    source = Storage(Settings().data_dir).artifact_dir(artifact_id)
    if not source.is_dir():
        fail(
            f"artifact:{artifact_id} is not in a data directory of this machine",
            f"It is safe in the service's own, under artifacts/{artifact_id}.",
        )
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    fresh, old = (target.with_name(f".{target.name}.{mark}.{what}") for what in ("new", "old"))
    try:
        shutil.copytree(source, fresh)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    finally:
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
    err.print(f"{target} holds a copy of artifact:{artifact_id}", markup=False)
