"""What a model folder says about itself without loading it: config.json and safetensors headers (no torch)."""

import hashlib
import json
import re
import stat
import struct
from pathlib import Path
from typing import Any

from app.errors import AppError, BadRequest, Code

_MAX_HEADER = 100 << 20
_MAX_CONFIG = 10 << 20
_MODEL, _ADAPTER, _INDEX = "model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json"
_QUANTISED = re.compile(r"[-_](?:bnb[-_]4bit|unsloth|gptq|awq|fp8|gguf|[48]bit|int[48]|w\d+a\d+)\b", re.I)


def read_json(path: Path, param: str, most: int = _MAX_CONFIG) -> dict[str, Any]:
    """A JSON object from a model folder, of ``most`` bytes. Raises BadRequest that names the file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is not a regular file")  # a FIFO would be waited for
        if path.stat().st_size > most:
            raise ValueError("it is too large")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BadRequest(
            f"{path.name} is missing in the model's folder",
            param=param,
            code=Code.MODEL_INVALID,
            hint="Name a folder that a Hugging Face model was saved to.",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadRequest(f"{path.name} cannot be read: {error}", param=param, code=Code.MODEL_INVALID) from error
    if not isinstance(value, dict):
        raise BadRequest(f"{path.name} is not an object", param=param, code=Code.MODEL_INVALID)
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that are a folder's model or adapter, sorted: what its index names, else the one file.

    Other programs' copies of the same weights lie beside them in some folders (``consolidated.safetensors``). Without
    an index or a file of the usual name all count. Raises ValueError for an index that cannot be followed.
    """
    found = sorted(folder.glob("*.safetensors"))
    names = [path.name for path in found]
    whole = _ADAPTER if (folder / "adapter_config.json").is_file() and _ADAPTER in names else _MODEL
    if whole == _MODEL and (folder / _INDEX).is_file():
        wanted = _indexed(folder / _INDEX)
        if absent := sorted(wanted - set(names)):
            raise ValueError(f"{_INDEX} names {absent[0]}, which is not there")
        if _MODEL in names and _MODEL not in wanted:
            raise ValueError(f"{_MODEL} and {_INDEX} are two models: take one of them out")
        return [path for path in found if path.name in wanted]
    return [folder / whole] if whole in names else found


def _indexed(path: Path) -> set[str]:
    """The files that an index names. Raises ValueError."""
    try:
        if path.stat().st_size > _MAX_HEADER:
            raise ValueError("it is too large")
        wanted = {str(name) for name in json.loads(path.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    if not wanted:
        raise ValueError(f"{path.name} names no file")
    return wanted


def tensor_shapes(folder: Path, param: str) -> dict[str, list[int]]:
    """Names and shapes of all tensors of a folder's model or adapter. Raises BadRequest."""
    shapes: dict[str, list[int]] = {}
    try:
        files = weight_files(folder)
    except ValueError as error:
        raise BadRequest(f"{param}: {error}", param=param, code=Code.MODEL_INVALID) from error
    for path in files:
        shapes |= _header(path, param)
    return shapes


def _header(path: Path, param: str) -> dict[str, list[int]]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER or length > path.stat().st_size:
                raise ValueError("its header is longer than the file or the limit")
            header = json.loads(file.read(length))
        return {name: list(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise BadRequest(
            f"{path.name} is not a whole safetensors file: {error}", param=param, code=Code.MODEL_INVALID
        ) from error


def unquantised_sibling(reference: str) -> str | None:
    """The likely name of the model that a quantised one was made from; None where its own name tells nothing."""
    sibling = _QUANTISED.sub("", reference)
    return sibling if sibling != reference else None


def quantised_by_name(reference: str) -> str | None:
    """What in a model's name says that its weights are stored quantised; None where nothing does."""
    marks = [mark[0][1:] for mark in _QUANTISED.finditer(reference)]
    return next((mark for mark in marks if mark.lower() != "unsloth"), None)  # who packed it: that alone says nothing


def check_unquantised(config: dict[str, Any], param: str, purpose: str, reference: str = "") -> None:
    """Refuses a base whose stored weights are already quantised (GPTQ, AWQ, bitsandbytes).

    ``reference``: what it was called, so that the hint can name its sibling.
    """
    block = config.get("quantization_config")
    if isinstance(block, dict):
        sibling = unquantised_sibling(reference)
        raise BadRequest(
            f"the model is stored quantised ({block.get('quant_method', 'unknown')}); {purpose} cannot use that",
            param=param,
            code=Code.QUANTISED_BASE,
            hint="Name the unquantised sibling of this model" + (f", probably {sibling}." if sibling else "."),
        )


def check_mergeable(folder: Path, param: str, reference: str) -> None:
    """Refuses what nothing can be added to: weights that are stored quantised, an adapter, what is no model."""
    if looks_like_adapter(folder):
        raise BadRequest(
            f"{param}: this is an adapter, not a whole model",
            param=param,
            code=Code.WRONG_KIND,
            hint="Name adapters as adapter or adapters, or merge it into its base first.",
        )
    check_unquantised(read_json(folder / "config.json", param), param, "a merge", reference)


def looks_like_adapter(folder: Path) -> bool:
    """True for a folder that peft saved."""
    try:
        return (folder / "adapter_config.json").is_file()
    except OSError as error:
        raise BadRequest(
            f"the model's folder cannot be read: {error.strerror}",
            param="model",
            code=Code.MODEL_INVALID,
            hint="Give the service's user access to it.",
        ) from error


def template_of(folder: Path) -> str | None:
    """The chat template, from its own file or from the tokenizer's config; of several under names, all of them."""
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            return path.read_text()
        template = read_json(folder / "tokenizer_config.json", "model").get("chat_template")
    except (AppError, OSError, UnicodeDecodeError):
        return None
    return template if isinstance(template, str) or not template else json.dumps(template, sort_keys=True)


def template_sha256(folder: Path) -> str | None:
    """What tells whether two folders have the same chat template; None where there is none."""
    template = template_of(folder)
    return hashlib.sha256(template.encode()).hexdigest() if template else None
