"""What foreign folders are looked at for before any library opens them: code, addresses, and pickles under other names.

Libraries read more of a config than they write of it: each key below makes one of them load code that the folder names,
from the folder itself or from the hub.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.errors import Code, RunError

MAX_CONFIG_BYTES = 16 * 1024 * 1024
MAX_TEMPLATE_BYTES = 1024 * 1024
"""Of a chat template; those of real models have some ten thousand bytes."""
# Words of a vocabulary and names of tensors, which may be anything.
_WORDS = ("tokenizer.json", "vocab.json", "added_tokens.json", "*.index.json")
_CODE = frozenset({"auto_map", "custom_pipelines", "custom_generate", "megatron_config"})
_ORIGINS = frozenset({"_name_or_path", "name_or_path", "base_model_name_or_path"})
_REPOSITORY = re.compile(r"(?:hub:|https?://)?[A-Za-z0-9][\w.-]*/[\w.-]+(?:[@:/][\w./-]*)?")
# What pickles and zip archives, in which torch keeps them, begin with.
_PICKLE = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]")
_TAKE_OUT = "Take it out of the file; models that bring their own code are not run."
# peft notes in auto_mapping which class an adapter was made on.
_PLAIN_MAPPING = re.compile(r"transformers(?:\.[a-z0-9_.]+)?")


def scan(folder: Path) -> None:
    """Raises RunError model_invalid that names file and key; nothing of the folder is changed or executed."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            continue  # its header is read by the same rules as every other one
        with path.open("rb") as file:
            if _PICKLE.match(file.read(4)):
                raise refused(f"{path.name} is a pickle or an archive under another name", "Leave it out.")
        if path.suffix == ".jinja":
            _check_template(path.name, path.stat().st_size)
        elif path.suffix == ".json" and not any(path.match(glob) for glob in _WORDS):
            _scan_json(path)


def _scan_json(path: Path) -> None:
    for where, key, value in _walk(read_json(path), ""):
        at = f"{path.name}: {where}"
        if key in _CODE or key.endswith("_implementation_internal"):
            if value:
                raise refused(f"{at} names code to run", _TAKE_OUT)
        elif key.endswith("_implementation"):
            if any("/" in text for text in _texts(value)):
                raise refused(f"{at} names a kernel of the hub: {str(value)[:100]!r}", _TAKE_OUT)
        elif key == "auto_mapping":
            if isinstance(value, dict) and not _PLAIN_MAPPING.fullmatch(str(value.get("parent_library"))):
                raise refused(f"{at} names code to run", _TAKE_OUT)
        elif key == "chat_template":
            _check_template(at, sum(len(text.encode("utf-8", "surrogatepass")) for text in _texts(value)))
        elif path.name == "config.json" and key not in _ORIGINS and _REPOSITORY.fullmatch(str(value)):
            raise refused(f"{at} names another place: {str(value)[:100]!r}", _TAKE_OUT)


def read_json(path: Path) -> Any:
    """A JSON file of a model folder. Raises RunError model_invalid."""
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise refused(f"{path.name} is too large", f"It may have {MAX_CONFIG_BYTES >> 20} MiB.")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise refused(f"{path.name} cannot be read: {error!r}"[:500], None) from error


def _check_template(name: str, size: int) -> None:
    if size > MAX_TEMPLATE_BYTES:
        limit = f"It may have {MAX_TEMPLATE_BYTES >> 10} KiB; take the model's own."
        raise refused(f"{name}: a chat template of {size} bytes", limit)


def _walk(value: Any, where: str) -> Iterator[tuple[str, str, Any]]:
    """Every field at any depth: its path, its key and what it holds."""
    if isinstance(value, dict):
        for key, inner in value.items():
            path = f"{where}.{key}" if where else str(key)
            yield path, str(key), inner
            yield from _walk(inner, path)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _walk(inner, f"{where}.{number}")


def _texts(value: Any) -> Iterator[str]:
    """The strings in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def clean_adapter(path: Path) -> None:
    """Takes out of an adapter's config which folder its base lay in, and which class it was made on."""
    config = read_json(path)
    if not isinstance(config, dict):
        return  # the check of the adapter names that fault
    base = config.get("base_model_name_or_path")
    kept = config | ({"auto_mapping": None} if "auto_mapping" in config else {})
    if isinstance(base, str) and not re.fullmatch(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?", base):
        kept["base_model_name_or_path"] = base.rstrip("/").rpartition("/")[2] or None
    if kept != config:
        path.write_text(json.dumps(kept, indent=2) + "\n")


def refused(message: str, hint: str | None) -> RunError:
    """The error of everything here."""
    return RunError(Code.MODEL_INVALID, message, hint=hint, param="path")
