"""Exports, looked at before they are stored: can this model and its tokenizer be written as GGUF?"""

from pathlib import Path

from app import gguf
from app.artifacts import inspect
from app.errors import BadRequest, Code


def check(folder: Path, path: str, reference: str) -> None:
    """Refuses a model that lies here and cannot be written; ``path`` is the field. Raises BadRequest.

    A tokenizer without tokenizer.json is judged by the run, which can read the older files.
    """
    if inspect.looks_like_adapter(folder):
        raise BadRequest(
            f"{path}: {reference} is an adapter, and a GGUF file holds a whole model",
            param=path,
            code=Code.WRONG_KIND,
            hint=f'Merge it first: submit {{"type": "merge", "adapter": "{reference}"}} and export its result.',
        )
    config = inspect.read_json(folder / "config.json", path)
    inspect.check_unquantised(config, path, "an export", reference)
    fault = gguf.model_misfit(config)
    if fault is None and (folder / "tokenizer.json").is_file():
        fault = gguf.tokenizer_misfit(inspect.read_json(folder / "tokenizer.json", path, most=gguf.MOST_TOKENIZER))
    if fault is not None:
        raise BadRequest(f"{path}: {fault.message}", param=path, code=Code.MODEL_INVALID, hint=fault.hint)
