"""What a model's files tell of how its engine is to be started."""

from pathlib import Path

from app.artifacts.inspect import read_json, tensor_shapes
from app.errors import AppError
from app.targets import EMBEDDINGS, HEADS

_DENSE = frozenset(
    ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
)


def lora_modules(folder: Path) -> tuple[str, ...]:
    """Names of the linear modules within the layers; none unless all of them are of the usual dense kind."""
    try:
        shapes = tensor_shapes(folder, "model")
    except AppError:  # the engine says what is wrong with the files
        return ()
    matrices = {name.removesuffix(".weight").rpartition(".")[2] for name, shape in shapes.items() if len(shape) > 1}
    found = matrices - (EMBEDDINGS | HEADS)
    return tuple(sorted(found)) if found <= _DENSE else ()


def dtype_of(asked: str, folder: Path, *, has_gpu: bool) -> str:
    """float32 unless a GPU computes in less, or somebody asked.

    Of a quantised model bfloat16: vLLM's products with 4-bit weights are not made for float32.
    """
    if asked != "auto":
        return asked
    quantised = bool(read_json(folder / "config.json", "model").get("quantization_config"))
    return "bfloat16" if has_gpu or quantised else "float32"
