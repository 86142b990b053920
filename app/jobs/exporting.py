"""Exports, looked at before they are stored: can this model be written as GGUF, or with fewer bits a weight?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from app import gguf
from app.artifacts import inspect
from app.errors import BadRequest, Code


def check_gguf(folder: Path, path: str, reference: str) -> None:
    """Refuses a model that lies here and cannot be written; ``path`` is the field. Raises BadRequest.

    A tokenizer without tokenizer.json is judged by the run, which can read the older files.
    """
    config = _whole_model(folder, path, reference, "a GGUF file holds a whole model", "export")
    fault = gguf.model_misfit(config)
    if fault is None and (folder / "tokenizer.json").is_file():
        fault = gguf.tokenizer_misfit(inspect.read_json(folder / "tokenizer.json", path, most=gguf.MOST_TOKENIZER))
    if fault is not None:
        raise BadRequest(f"{path}: {fault.message}", param=path, code=Code.MODEL_INVALID, hint=fault.hint)


def check_quantizable(folder: Path, path: str, reference: str) -> None:
    """Refuses an adapter, and a model that is stored quantised already. Raises BadRequest."""
    _whole_model(folder, path, reference, "a whole model is quantised", "quantize")


CHECKS: dict[str, Callable[[Path, str, str], None]] = {"export": check_gguf, "quantize": check_quantizable}
"""By the job's type."""


def _whole_model(folder: Path, path: str, reference: str, why: str, verb: str) -> dict[str, Any]:
    """Its config."""
    if inspect.looks_like_adapter(folder):
        raise BadRequest(
            f"{path}: {reference} is an adapter, and {why}",
            param=path,
            code=Code.WRONG_KIND,
            hint=f'Merge it first: submit {{"type": "merge", "adapter": "{reference}"}} and {verb} its result.',
        )
    config = inspect.read_json(folder / "config.json", path)
    inspect.check_unquantised(config, path, "an export" if verb == "export" else "a quantisation", reference)
    return config
