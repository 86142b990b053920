"""What adapters add to a base's tensors, a block of rows at a time, in float32.

A stored tensor is a stack of matrices: one for a weight, one for each expert where all experts are one tensor. Blocks
of rows never cross from one matrix into the next, and are cut alike wherever they are worked out, because a product of
matrices depends in its last bit on their shapes: below 64 rows MKL takes other kernels. Cut so, B[rows] · A has the
bits of (B · A)[rows], and the merge those of peft's.
"""

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from app.errors import Code, RunError
from workers.loading.layout import Placed
from workers.loading.weights import DTYPES, TensorInfo

BLOCK = 1 << 20
"""Elements of a block: 4 MB in float32, small enough for a core's cache."""
LEAST_ROWS = 64
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}
TORCH = DTYPES
STORED = {name: stored for stored, name in DTYPES.items()}


class Block(NamedTuple):
    """Rows ``start`` to ``stop`` of matrix ``matrix``; ``first`` is the row's number in the whole tensor."""

    matrix: int
    start: int
    stop: int
    first: int


def stack_of(shape: Sequence[int]) -> tuple[int, int, int]:
    """A tensor's shape as (matrices, rows, columns); a vector is one row."""
    if len(shape) < 2:
        return 1, 1, math.prod(shape)
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return 1, shape[0], math.prod(shape[1:])


def blocks(shape: Sequence[int]) -> Iterator[Block]:
    """A tensor cut into blocks of whole rows; a short rest goes to the block before it."""
    matrices, rows, columns = stack_of(shape)
    size = max(LEAST_ROWS, BLOCK // max(1, columns) // LEAST_ROWS * LEAST_ROWS)
    for matrix in range(matrices if rows and columns else 0):
        start = 0
        while start < rows:
            stop = rows if rows - start < size + LEAST_ROWS else start + size
            yield Block(matrix, start, stop, matrix * rows + start)
            start = stop


class Mapped:
    """Safetensors files as memory: nothing is read before it is looked at, and it is not the process's own memory."""

    def __init__(self) -> None:
        self._files: dict[Path, mmap.mmap] = {}

    def bytes(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> Any:
        """Bytes ``start`` to ``stop`` of a tensor, as a uint8 tensor that is not to be written to."""
        import torch

        stop = info.bytes if stop is None else stop
        if stop <= start:
            return torch.empty(0, dtype=torch.uint8)
        whole = self._files.get(info.path)
        if whole is None:
            with info.path.open("rb") as file:
                # A private copy in name alone: no page is ever written.
                whole = self._files[info.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(whole, dtype=torch.uint8, count=stop - start, offset=info.start + start)

    def tensor(self, info: TensorInfo) -> Any:
        """A whole tensor in its own dtype and shape. Raises RunError for a dtype that no weight has."""
        return self._typed(self.bytes(info), info).reshape(info.shape)

    def rows(self, info: TensorInfo, block: Block) -> Any:
        """A block of a tensor in its own dtype, [rows, columns]."""
        columns = stack_of(info.shape)[2]
        width = columns * width_of(info)
        first = block.first * width
        part = self.bytes(info, first, first + (block.stop - block.start) * width)
        return self._typed(part, info).reshape(block.stop - block.start, columns)

    def floats(self, info: TensorInfo, block: Block) -> Any:
        """The same in float32, as memory of our own that may be written to."""
        import torch

        return self.rows(info, block).to(torch.float32, copy=True)

    def release(self, info: TensorInfo) -> None:
        """Lets go of a tensor's pages; they come back when they are looked at again."""
        whole = self._files.get(info.path)
        page = mmap.PAGESIZE
        start, stop = -(-info.start // page) * page, info.end // page * page
        if whole is not None and stop > start:
            whole.madvise(mmap.MADV_DONTNEED, start, stop - start)

    @staticmethod
    def _typed(part: Any, info: TensorInfo) -> Any:
        import torch

        width_of(info)
        return part.view(getattr(torch, TORCH[info.dtype])) if part.numel() else part.to(torch.float32)


def width_of(info: TensorInfo) -> int:
    """Bytes of one element. Raises RunError model_invalid for a dtype that cannot be added to."""
    if info.dtype not in WIDTHS:
        raise RunError(Code.MODEL_INVALID, f"a tensor in {info.path.name} is stored as {info.dtype}, not as numbers")
    return WIDTHS[info.dtype]


@dataclass
class Step:
    """One adapter's change of one tensor, loaded. ``apply`` works on float32 rows in place, or gives new ones."""

    placed: Placed
    info: TensorInfo
    """The first of its tensors in the adapter: the one of a ``whole``."""
    mapped: Mapped
    b: Any = None
    a: Any = None
    magnitude: Any = None
    norms: dict[int, Any] = field(default_factory=dict)
    """By matrix: the lengths of W + ΔW per output, where they do not lie within a block."""

    def factors(self, matrix: int) -> tuple[Any, Any]:
        """B [out, r] and A [r, in] of a matrix."""
        placed = self.placed
        b, a = self.b, self.a
        if placed.experts > 1:
            expert = matrix if placed.expert is None else placed.expert
            a = a.reshape(placed.experts, -1, a.shape[-1])[expert]
            b = b.reshape(b.shape[0], -1, placed.experts)[:, :, expert]
        if placed.rows:
            b = b[slice(*placed.rows)]
        return b.contiguous(), a

    def delta(self, block: Block) -> Any:
        """scale · B · A at these rows of the stored matrix."""
        import torch

        b, a = self.factors(block.matrix)
        if self.placed.transposed:
            return torch.mm(b, a[:, block.start : block.stop]).t().mul_(self.placed.scale)
        return torch.mm(b[block.start : block.stop], a).mul_(self.placed.scale)

    def apply(self, rows: Any, block: Block) -> Any:
        """The float32 rows [rows, columns] with the change."""
        if self.placed.kind == "whole":
            return self.mapped.floats(self.info, block)
        if self.placed.kind == "bias":
            return rows.add_(self.b * self.placed.scale)
        rows = rows.add_(self.delta(block))
        if self.magnitude is None:
            return rows
        if self.placed.transposed:
            return rows.mul_((self.magnitude / self.norms[block.matrix]).view(1, -1))
        return rows.mul_((self.magnitude[block.start : block.stop] / rows.norm(dim=1)).view(-1, 1))


Steps = dict[str, list[Step]]


def load_steps(placed: Sequence[Placed], tensors: Mapping[str, TensorInfo], into: Steps) -> None:
    """Loads an adapter's factors in float32 and appends its steps to those of the adapters before it."""
    mapped = Mapped()

    def floats(name: str) -> Any:
        return mapped.tensor(tensors[name]).float()

    for item in placed:
        step = Step(item, tensors[item.names[0]], mapped)
        if item.kind == "low_rank":
            step.b, step.a = (floats(name) for name in item.names)
            if item.magnitude:
                step.magnitude = floats(item.magnitude).reshape(-1)
        elif item.kind == "bias":
            step.b = floats(item.names[0])
        into.setdefault(item.target, []).append(step)


def measure(steps: Sequence[Any], info: TensorInfo, base: Mapped) -> None:
    """The lengths that DoRA needs of a matrix stored (in, out): over all blocks, so before the first is changed."""
    import torch

    for number, step in enumerate(steps):
        if step.magnitude is None or not step.placed.transposed or step.norms:
            continue
        sums: dict[int, Any] = {}
        for block in blocks(info.shape):
            rows = changed(steps[:number], base.floats(info, block), block)
            squares = (rows + step.delta(block)).double().square_().sum(0)
            sums[block.matrix] = sums.get(block.matrix, torch.zeros_like(squares)) + squares
        step.norms = {matrix: total.sqrt().float() for matrix, total in sums.items()}


def changed(steps: Sequence[Any], rows: Any, block: Block) -> Any:
    """Float32 rows after all adapters, in their order."""
    for step in steps:
        rows = step.apply(rows, block)
    return rows
