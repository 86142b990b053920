"""A model of the hub, on this disk: which commit it is, whether it fits, what of it is fetched, how far that is.

Files lie in the cache that every Hugging Face library on this machine shares (``HF_HOME``). What is whole there is used
where it lies, and nothing is asked of the hub for it when the revision is a commit.
"""

import contextlib
import glob
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from app import disk, states
from app.artifacts import inspect
from app.catalog import RunContext
from app.errors import Code, RunError
from workers import hub, parts

CONFIG = "config.json"
WEIGHTS = "*.safetensors"
WANTED = (WEIGHTS, "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*")
# The same weights once more, as another program names them.
TWICE = "consolidated*.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_POLL = 0.5


class Staged(NamedTuple):
    """Where the model lies, and its commit (40 hex digits)."""

    folder: Path
    commit: str


def stage(
    repo: str, revision: str | None, field: str, ctx: RunContext, reserve: int = 0, *, plain: bool = False
) -> Staged:
    """Fetches what of a repository is not here yet. ``reserve``: bytes of disk that stay free.

    ``plain``: weights that are stored quantised are refused by config.json, before any of them is fetched. Raises
    RunError that names ``field``: gated_model, hub_refused, model_not_found, model_invalid, quantised_base, disk_full,
    and model_unreachable, which is transient.
    """
    secret = hub.token()
    try:
        return _stage(repo, revision, field, ctx, reserve, secret, plain)
    except RunError:
        raise
    except Exception as error:
        raise hub.trouble(error, repo, field, secret) from error


def _stage(
    repo: str, revision: str | None, field: str, ctx: RunContext, reserve: int, secret: str | None, plain: bool
) -> Staged:
    from huggingface_hub import hf_hub_download, hf_hub_url, snapshot_download

    client = hub.client(secret)
    # Asks the hub for the commit, unless the revision is one; where the hub is down, the cache knows the last one.
    commit = str(client.resolve_revision(repo, revision=revision).resolved)
    folder = _whole(repo, commit)
    if folder is not None:
        ctx.event("model_cached", f"{repo} is in the Hugging Face cache.", repo=repo, commit=commit)
        return Staged(folder, commit)
    files = {file.path: file for file in client.list_repo_tree(repo, revision=commit) if hasattr(file, "blob_id")}
    names = _chosen(files)
    _check(repo, names, files, field)
    missing = {name: _wanted(repo, files[name]) for name in names if not _is_here(repo, commit, name, files[name])}
    total = sum(file.size for file in missing.values())
    parts.discard(_wanted(repo, files[name]) for name in names)
    parts.sweep(_home(repo) / "blobs")
    there = sum(parts.usable(file) for file in missing.values())
    _check_room(repo, total - there, field, reserve)
    ctx.event(
        "model_downloading",
        f"Fetching {repo} from the hub.",
        repo=repo,
        revision=revision,
        commit=commit,
        files=sorted(missing),
        bytes=total,
        bytes_here=there,
    )
    with _told(missing, total, ctx):
        if plain and CONFIG in names:
            config = hf_hub_download(repo, CONFIG, revision=commit, token=secret or False)
            refuse_quantised(Path(config), repo, field)
        parts.finish(missing, lambda name: str(hf_hub_url(repo, name, revision=commit)), secret)
        found = snapshot_download(
            repo, revision=commit, allow_patterns=[glob.escape(name) for name in names], token=secret or False
        )
    # Where the hub goes away in between, the library hands out what there is.
    absent = [name for name in names if not (Path(found) / name).is_file()]
    if absent:
        raise ConnectionError(f"{', '.join(absent[:5])} did not come")
    ctx.event("model_download_complete", f"{repo} is here.", repo=repo, commit=commit, bytes=total)
    return Staged(Path(found), commit)


def refuse_quantised(config: Path, repo: str, field: str) -> None:
    """Raises RunError quantised_base for a config.json of weights that are stored quantised."""
    try:
        found = json.loads(config.read_bytes()).get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # the loader names that fault
    if found:
        method = found.get("quant_method", "unknown method") if isinstance(found, dict) else "unknown method"
        sibling = inspect.unquantised_sibling(repo)
        raise RunError(
            Code.QUANTISED_BASE,
            f"{field}: {repo} is stored quantised ({method}); nothing of its weights was fetched",
            param=field,
            hint="Name the unquantised model" + (f", probably {sibling}." if sibling else "."),
        )


def _chosen(names: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """What is wanted of a repository's files: weights, config, tokenizer, licence; of the top folder alone."""
    found = [name for name in names if "/" not in name and any(fnmatch(name, glob) for glob in WANTED)]
    others = [name for name in found if fnmatch(name, WEIGHTS) and not fnmatch(name, TWICE)]
    return sorted(name for name in found if not others or not fnmatch(name, TWICE))


def _check(repo: str, names: Sequence[str], files: Mapping[str, Any], field: str) -> None:
    if any(fnmatch(name, WEIGHTS) for name in names):
        return
    pickles = sorted(name for name in files if any(fnmatch(name, glob) for glob in PICKLES))
    raise RunError(
        Code.MODEL_INVALID,
        f"{field}: {repo} holds its weights only as pickles: {', '.join(pickles[:5])}"
        if pickles
        else f"{field}: {repo} holds no weights as safetensors",
        param=field,
        hint="Name a repository with *.safetensors: opening a pickle can run any code."
        if pickles
        else "Name the repository that holds config.json and *.safetensors.",
    )


# --- what is here -----------------------------------------------------------------------------------------------------


def cache() -> Path:
    """The cache of the hub's libraries on this machine."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def _home(repo: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return cache() / str(repo_folder_name(repo_id=repo, repo_type="model"))


def _whole(repo: str, commit: str) -> Path | None:
    """The snapshot, when everything that is wanted of it is here; asks nobody."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    folder = _home(repo) / "snapshots" / commit
    if not folder.is_dir():
        return None
    try:
        listed = [file.path for file in get_cached_repo_tree(repo, revision=commit)]
    except CachedRepoTreeNotFoundError:
        return folder if _looks_whole(folder) else None
    names = _chosen(listed)
    whole = bool(names) and any(fnmatch(name, WEIGHTS) for name in names)
    return folder if whole and all((folder / name).is_file() for name in names) else None


def _looks_whole(folder: Path) -> bool:
    """Of a cache that an older library made, which kept no list: config, every shard, and a tokenizer."""
    config = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    if not config or not any((folder / name).is_file() for name in _TOKENIZERS):
        return False
    indexes = list(folder.glob("*.safetensors.index.json"))
    try:
        shards = {shard for index in indexes for shard in json.loads(index.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    if not shards:
        return any(path.is_file() for path in folder.glob(WEIGHTS))
    return all((folder / str(shard)).is_file() for shard in shards)


def _blob(repo: str, file: Any) -> Path:
    """Where the library puts a file's bytes: under the hash that the hub has of them."""
    return _home(repo) / "blobs" / str(file.lfs.sha256 if file.lfs is not None else file.blob_id)


def _wanted(repo: str, file: Any) -> parts.Wanted:
    return parts.Wanted(_blob(repo, file), int(file.size), str(file.lfs.sha256) if file.lfs is not None else None)


def _is_here(repo: str, commit: str, name: str, file: Any) -> bool:
    return (_home(repo) / "snapshots" / commit / name).is_file() or _blob(repo, file).is_file()


def _check_room(repo: str, total: int, field: str, reserve: int) -> None:
    place = cache()
    while not place.exists():
        place = place.parent
    free = disk.free_bytes(place)
    if total + reserve > free:
        raise RunError(
            Code.DISK_FULL,
            f"{field}: {repo} needs {total / 1e9:.2f} GB on the disk of HF_HOME, which has {free / 1e9:.2f} GB free, "
            f"{reserve / 1e9:.2f} GB of them in reserve",
            param=field,
            hint="Free space there, or set HF_HOME to a folder on a larger disk.",
        )


# --- how far it is ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _told(missing: Mapping[str, parts.Wanted], total: int, ctx: RunContext) -> Iterator[None]:
    """Says in the meantime how many bytes are here, by what lies on the disk, and keeps the halves among them."""
    over = threading.Event()
    blobs = [file.blob for file in missing.values()]
    begun, first = time.monotonic(), sum(map(parts.size, blobs))

    def watch() -> None:
        while not over.wait(_POLL):
            if ctx.stop_requested():
                # The library cannot be interrupted, and there is nothing to save: what is here stays.
                os._exit(states.EXIT_CHECKPOINTED)
            parts.keep(missing.values())
            done = sum(map(parts.size, blobs))
            left = (time.monotonic() - begun) / (done - first) * (total - done) if done > first else None
            ctx.progress(min(done, total), max(total, 1), eta_seconds=left)
            ctx.tick()

    thread = threading.Thread(target=watch, name="staging", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    parts.discard(missing.values())
    ctx.progress(total, max(total, 1), eta_seconds=0.0)
