"""Weight files: safetensors headers, digests, and the search for values that are not finite."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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


# Bits of one value, by dtype as safetensors writes it.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


def _header(path: Path) -> dict[str, TensorInfo]:
    """What a file holds, by the rules of safetensors itself, before any library reads it. Raises RunError."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= MAX_HEADER_BYTES:
                raise ValueError(f"header of {size} bytes")
            header = json.loads(file.read(size), object_pairs_hook=_no_twins)
        total = path.stat().st_size
        notes = header.pop("__metadata__", {})
        if not all(isinstance(note, str) for note in notes.values()):
            raise ValueError("its metadata are more than words")
        tensors = {name: _info(path, name, entry, 8 + size) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(Code.MODEL_INVALID, f"{path.name} is no valid safetensors file: {error}") from error
    if any(tensor.end > total for tensor in tensors.values()):
        raise RunError(Code.MODEL_INVALID, f"{path.name} is cut short: its header points behind its end")
    end = 8 + size
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][3:]):
        if tensor.start != end:
            what = "overlaps the one before it" if tensor.start < end else "leaves a gap before it"
            raise RunError(Code.MODEL_INVALID, f"{path.name} is no valid safetensors file: {name} {what}")
        end = tensor.end
    if total > end:  # safetensors itself refuses such a file
        raise RunError(Code.MODEL_INVALID, f"{path.name} holds {total - end} bytes behind its last tensor")
    return tensors


def _info(path: Path, name: str, entry: Mapping[str, Any], data: int) -> TensorInfo:
    """One tensor of a header whose file has its data from byte ``data`` on. Raises ValueError, KeyError, TypeError."""
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, start, end)) or start > end:
        raise ValueError(f"{name} has shape {shape} at {start} to {end}"[:300])
    if dtype not in _BITS:
        raise ValueError(f"{name} is of {str(dtype)[:40]}, which is no dtype")
    if math.prod(shape) * _BITS[dtype] != (end - start) * 8:
        raise ValueError(f"{name} is {shape} of {dtype}, and has {end - start} bytes"[:300])
    return TensorInfo(path, dtype, tuple(shape), data + start, data + end)


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a key that comes twice, of which every reader takes another."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


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
