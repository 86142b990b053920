"""Whole models of one architecture on their way to one: tensor by tensor, in float32, in blocks of rows.

A method is a ``Mixture``: what is worked out once for a tensor (an angle, a threshold), and what becomes of each block.
Neither ever holds a tensor: memory does not grow with the models.
"""

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from app.errors import Code, RunError
from app.specs import Dtype
from workers.loading.deltas import STORED, Block, Mapped, blocks, width_of
from workers.loading.merge_spec import MergeSpec
from workers.loading.merging import Merge, read_config, read_merge
from workers.loading.weights import TensorInfo, fingerprint, tensor_headers

Rows = Callable[[TensorInfo, str, Block], Any]
"""``rows(info, name, block)``: float32 [rows, columns] that may be written to."""


class Part(NamedTuple):
    """A block of a tensor in every model, float32 [rows, columns], free to be written to."""

    models: list[Any]
    base: Any
    """Of the base; None where the method takes none."""
    weights: list[float]
    once: Any
    """What ``Mixture.once`` gave."""
    dice: Callable[[int], Any]
    """``dice(number)``: a generator for a model's block, of the seed, the tensor and the place alone."""
    spec: MergeSpec


class Whole(NamedTuple):
    """A tensor before its first block is mixed. ``parts()`` goes through its blocks; ``once`` is None in them."""

    parts: Callable[[], Iterator[Part]]
    elements: int
    spec: MergeSpec


@dataclass(frozen=True)
class Mixture:
    """One method. Both functions are pure: called again, they give the same bits."""

    blend: Callable[[Part], Any]
    once: Callable[[Whole], Any] | None = None


@dataclass
class Mixed:
    """The step that mixes one tensor; an output's ``source`` is the first model's."""

    name: str
    infos: tuple[TensorInfo, ...]
    base: TensorInfo | None
    mixture: Mixture
    spec: MergeSpec
    rows: Rows
    magnitude: None = None
    _once: Any = None
    _known: bool = False
    _lock: Any = field(default_factory=threading.Lock)

    def apply(self, rows: Any, block: Block) -> Any:
        """The mixed rows in place of the first model's."""
        if self.mixture.once is not None:
            with self._lock:
                if not self._known:
                    self._once, self._known = self.mixture.once(self._whole()), True
        return self.mixture.blend(self._part(block, self._once))

    def _part(self, block: Block, once: Any = None) -> Part:
        models = [self.rows(info, self.name, block) for info in self.infos]
        base = None if self.base is None else self.rows(self.base, self.name, block)
        weights = self.spec.weights or [1.0] * len(models)
        return Part(models, base, weights, once, lambda number: self._dice(number, block), self.spec)

    def _whole(self) -> Whole:
        shape = self.infos[0].shape
        elements = self.infos[0].bytes // width_of(self.infos[0])
        return Whole(lambda: (self._part(block) for block in blocks(shape)), elements, self.spec)

    def _dice(self, number: int, block: Block) -> Any:
        import torch

        place = zlib.crc32(f"{self.name}/{number}/{block.first}".encode())
        return torch.Generator().manual_seed(self.spec.seed << 32 | place)


def mapped_rows(mapped: Mapped) -> Rows:
    """Rows of files that are memory."""
    return lambda info, name, block: mapped.floats(info, block)


def read_mix(
    models: Sequence[Path], base: Path | None, mixture: Mixture, spec: MergeSpec, dtype: Dtype | None
) -> Merge:
    """What is written: the first model's config and tensors, mixed. Raises RunError model_invalid, base_mismatch."""
    check_alike(models, base)
    merge = read_merge(models[0], (), dtype)
    headers = [tensor_headers(model) for model in models]
    before = tensor_headers(base) if base is not None else None
    rows = mapped_rows(Mapped())
    outputs = []
    for output in merge.outputs:
        if output.source.dtype not in STORED.values():
            outputs.append(output)  # counters and the like: the first model's
            continue
        infos = tuple(found[output.name] for found in headers)
        own = before[output.name] if before is not None else None
        outputs.append(output._replace(steps=(Mixed(output.name, infos, own, mixture, spec, rows),)))
    others = [fingerprint(folder) for folder in (*models[1:], *([base] if base is not None else []))]
    own_words = spec.model_dump_json(include={"method", "weights", "density", "majority_sign_method", "t", "seed"})
    return replace(merge, outputs=tuple(outputs), also=(*others, own_words))


def check_alike(models: Sequence[Path], base: Path | None) -> None:
    """Raises RunError base_mismatch unless all have the same tensors in the same shapes, in one architecture."""
    first = tensor_headers(models[0])
    kind = read_config(models[0]).get("model_type")
    others = [(f"models.{number}", folder) for number, folder in enumerate(models)][1:]
    for field_, folder in [*others, *([("base_model", base)] if base is not None else [])]:
        found = tensor_headers(folder)
        its = read_config(folder).get("model_type")
        what = None
        if its != kind:
            what = f"it is a {its}, and the first model a {kind}"
        elif lone := sorted(found.keys() ^ first.keys()):
            has = "it has" if lone[0] in found else "it lacks"
            what = f"{has} {lone[0]}, unlike the first model ({len(lone)} tensors in all)"
        elif other := next((name for name in sorted(first) if found[name].shape != first[name].shape), None):
            what = f"{other} is {list(found[other].shape)}, and {list(first[other].shape)} in the first model"
        if what:
            raise RunError(
                Code.BASE_MISMATCH,
                f"{field_}: {what}",
                hint="Merge models that were trained from one base.",
                param=field_,
            )


def agreed(deltas: Sequence[Any], weights: Sequence[float], method: str) -> Any:
    """TIES' vote and mean: of each place the weighted mean of the changes that have the sign of most.

    ``method``: most by the sum of weighted changes (total) or by their number (frequency). Zero counts as plus.
    """
    import torch

    weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    votes = weighted if method == "total" else [delta.sign() for delta in weighted]
    positive = sum(votes[1:], votes[0].clone()) >= 0
    total, share = torch.zeros_like(weighted[0]), torch.zeros_like(weighted[0])
    for delta, weight in zip(weighted, weights, strict=True):
        agrees = torch.where(positive, delta > 0, delta < 0)
        total += delta * agrees
        share += agrees * weight
    return total.div_(torch.where(share == 0, torch.ones_like(share), share))
