"""Weight files: safetensors headers, digests, and the search for values that are not finite."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from app.artifacts import inspect
from app.errors import Code, RunError
from app.specs import Dtype

MAX_HEADER_BYTES = 100 * 1024 * 1024
SAMPLE_BYTES = 4096


class TensorInfo(NamedTuple):
    """Where a tensor lies: file, dtype as safetensors writes it, shape, and the byte range in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return self.end - self.start


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that count: no other program's copy of the same weights. Raises RunError model_invalid."""
    try:
        return inspect.weight_files(directory)
    except ValueError as error:
        raise RunError(
            Code.MODEL_INVALID,
            f"{directory.name}: {error}",
            hint="name a folder as save_pretrained leaves it: one file, or shards and their index",
        ) from error


def tensor_headers(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a folder's model or adapter by name, from the headers alone. Raises RunError model_invalid."""
    tensors: dict[str, TensorInfo] = {}
    for path in weight_files(directory):
        tensors.update(_header(path))
    if not tensors:
        raise RunError(
            Code.MODEL_INVALID,
            f"{directory.name} holds no safetensors weights",
            hint="save the model with save_pretrained, which writes safetensors",
        )
    return tensors


def _header(path: Path) -> dict[str, TensorInfo]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= MAX_HEADER_BYTES:
                raise ValueError(f"header of {size} bytes")
            header = json.loads(file.read(size))
        total = path.stat().st_size
        tensors = {
            name: TensorInfo(
                path,
                str(entry["dtype"]),
                tuple(int(length) for length in entry["shape"]),
                *(8 + size + int(offset) for offset in entry["data_offsets"]),
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(Code.MODEL_INVALID, f"{path.name} is no valid safetensors file: {error}") from error
    if any(tensor.end > total or tensor.start > tensor.end for tensor in tensors.values()):
        raise RunError(Code.MODEL_INVALID, f"{path.name} is cut short: its header points behind its end")
    surplus = total - max((tensor.end for tensor in tensors.values()), default=8 + size)
    if surplus:  # safetensors itself refuses such a file
        raise RunError(Code.MODEL_INVALID, f"{path.name} holds {surplus} bytes behind its last tensor")
    return tensors


def fingerprint(directory: Path) -> str:
    """A digest of what the weights are: names, dtypes, shapes, and the first bytes of every tensor.

    It tells a base from its instruct sibling in milliseconds, however large; how the tensors are spread over files does
    not matter.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensor_headers(directory).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        with tensor.path.open("rb") as file:
            file.seek(tensor.start)
            digest.update(file.read(min(SAMPLE_BYTES, tensor.bytes)))
    return digest.hexdigest()


DTYPES: dict[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def stored_dtype(tensors: Mapping[str, TensorInfo]) -> Dtype:
    """The floating dtype that most bytes are stored in. Raises RunError model_invalid for anything else."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.bytes
    most = sizes.most_common(1)[0][0]
    if most not in DTYPES:
        raise RunError(Code.MODEL_INVALID, f"the weights are stored as {most}", hint="use an unquantised model")
    return DTYPES[most]


def sha256_files(paths: Iterable[Path]) -> dict[str, str]:
    """File name → sha256 in hex."""
    digests = {}
    for path in sorted(paths):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def non_finite(directory: Path) -> list[str]:
    """Names of the tensors that hold NaN or infinity, sorted; one tensor in memory at a time."""
    import torch
    from safetensors.torch import safe_open

    bad = []
    for path in weight_files(directory):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    bad.append(name)
    return sorted(bad)
