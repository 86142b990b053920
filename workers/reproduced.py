"""Whether a run that was to make an artifact again did so, and with which libraries anything was made."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from app.storage import MANIFEST, Storage

LIBRARIES = (
    "tunesmith",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
)


def versions() -> dict[str, str]:
    """Of Python and of what is installed of the libraries that make models; imports none of them."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def compared(storage: Storage, artifact_id: str, made: str) -> dict[str, Any]:
    """``same``, and the names of files that differ; ``same`` is None where the first one is gone."""
    try:
        before, now = (_hashes(storage, one) for one in (artifact_id, made))
    except (OSError, ValueError, KeyError) as error:
        return {"artifact_id": artifact_id, "same": None, "differing": [], "reason": f"{type(error).__name__}: {error}"}
    differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return {"artifact_id": artifact_id, "same": not differing, "differing": differing}


def _hashes(storage: Storage, artifact_id: str) -> dict[str, str]:
    manifest = json.loads((storage.artifact_dir(artifact_id) / MANIFEST).read_bytes())
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}
