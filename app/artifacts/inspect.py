"""What a model folder says about itself without loading it: config.json and safetensors headers (no torch)."""

import json
import stat
import struct
from pathlib import Path
from typing import Any

from app.errors import AppError, BadRequest, Code

_MAX_HEADER = 100 << 20
_MAX_CONFIG = 10 << 20


def read_json(path: Path, param: str) -> dict[str, Any]:
    """A JSON object from a model folder. Raises BadRequest that names the file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is not a regular file")  # a FIFO would be waited for
        if path.stat().st_size > _MAX_CONFIG:
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


def tensor_shapes(folder: Path, param: str) -> dict[str, list[int]]:
    """Names and shapes of all tensors in a folder's safetensors files."""
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
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


def check_targets(shapes: dict[str, list[int]], targets: list[str], param: str) -> None:
    """Refuses target modules that none of the model's tensors belongs to."""
    modules = {
        name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight") and len(shape) >= 2
    }
    if not modules:
        return  # nothing to check against, e.g. a model that is only partly here
    missing = [name for name in targets if not any(path == name or path.endswith(f".{name}") for path in modules)]
    if missing:
        known = sorted({path.rsplit(".", 1)[-1] for path in modules if not path.endswith("embed_tokens")})
        raise BadRequest(
            f"the model has no module named {', '.join(missing)}",
            param=param,
            code=Code.TARGET_MODULES_NOT_FOUND,
            hint=f"It has: {', '.join(known[:20])}. Or use all-linear.",
        )


def check_unquantised(config: dict[str, Any], param: str, purpose: str) -> None:
    """Refuses a base whose stored weights are already quantised (GPTQ, AWQ, bitsandbytes)."""
    block = config.get("quantization_config")
    if isinstance(block, dict):
        raise BadRequest(
            f"the model is stored quantised ({block.get('quant_method', 'unknown')}); {purpose} cannot use that",
            param=param,
            code=Code.QUANTISED_BASE,
            hint="Name the unquantised sibling of this model.",
        )


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
    """The chat template, from its own file or from the tokenizer's config."""
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            return path.read_text()
        template = read_json(folder / "tokenizer_config.json", "model").get("chat_template")
    except (AppError, OSError, UnicodeDecodeError):
        return None
    return template if isinstance(template, str) else None
