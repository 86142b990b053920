"""The proof of a merged model's bytes: every tensor worked out again from base and adapters, and compared.

Nothing that the writer held is used: headers, configs and factors are read anew, through safetensors' own reader; the
sums are written down a second time, scale and orientation are read from other signs. Shared with the writer are four
things. Where a matrix is cut into blocks, because the last bit of a product depends on it. Which tensor a module's
factors go to (``place``). Which tensor is the embedding, and whether the head is it. What 4-bit storage does, and to
which tensors. A mistake in the last three shows in the logits alone.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.errors import RunError
from app.specs import Dtype
from workers.loading.adapters import read_adapter
from workers.loading.deltas import STORED, TORCH, Block, blocks, stack_of
from workers.loading.devices import set_threads
from workers.loading.layout import HEAD, Placed, embedding_of, place
from workers.loading.merging import quantised_weights, read_config, tied
from workers.loading.nf4 import round_trip
from workers.loading.second_reading import SecondReading
from workers.loading.shards import INDEX
from workers.loading.weights import TensorInfo, tensor_headers

# Relative to the largest weight: what a rounded DoRA factor of one may be off.
_NOTHING = 1e-6
_TIED = "tie_word_embeddings"


@dataclass
class Findings:
    """What the proof found. Lists hold names of stored tensors, ``dead`` those of modules."""

    tensors: int = 0
    changed: int = 0
    """Tensors that the adapters are meant to change."""
    wrong: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    non_finite: list[str] = field(default_factory=list)
    overflowed: list[str] = field(default_factory=list)
    """Of these: finite in float32, infinite as stored."""
    files: list[str] = field(default_factory=list)
    """What is wrong with files and index, in words."""
    modules: int = 0
    dead: list[str] = field(default_factory=list)
    """Modules that the adapter names and does not change."""
    norm: float = 0.0
    """Frobenius norm of all products scale · B · A together."""

    @property
    def false(self) -> list[str]:
        """Everything that makes the bytes others than those of base and adapters, in words."""
        named = (("differs", self.wrong), ("is missing", self.missing), ("is not of the base", self.extra))
        return [*self.files, *(f"{name} {what}" for what, names in named for name in sorted(names))]


@dataclass(frozen=True)
class _Change:
    """One adapter's change of a tensor, with its factors in float32."""

    module: str
    placed: Placed
    tensors: Mapping[str, Any]
    copy: Any = None
    """A whole tensor as the adapter stores it."""

    def pair(self, matrix: int) -> tuple[Any, Any]:
        """B and A of a matrix."""
        b, a = (self.tensors[name] for name in self.placed.names)
        count = self.placed.experts
        if count > 1:
            number = self.placed.expert if self.placed.expert is not None else matrix
            rank = a.shape[0] // count
            a = a[number * rank : (number + 1) * rank]
            b = b[:, number::count]
        first, last = self.placed.rows or (0, b.shape[0])
        return b[first:last].contiguous(), a

    def product(self, block: Block) -> Any:
        b, a = self.pair(block.matrix)
        if self.placed.transposed:
            return (b @ a[:, block.start : block.stop] * self.placed.scale).T
        return b[block.start : block.stop] @ a * self.placed.scale


class Reader:
    """Rows of stored tensors through safetensors; one for each thread, because its files are not shared."""

    def __init__(self) -> None:
        self._files: dict[Path, Any] = {}

    def _file(self, path: Path) -> Any:
        from safetensors import safe_open

        if path not in self._files:
            self._files[path] = safe_open(str(path), framework="pt")
        return self._files[path]

    def tensor(self, name: str, info: TensorInfo) -> Any:
        return self._file(info.path).get_tensor(name)

    def rows(self, name: str, info: TensorInfo, block: Block) -> Any:
        """[rows, columns] in the stored dtype."""
        part = self._file(info.path).get_slice(name)
        if len(info.shape) == 3:
            part = part[block.matrix : block.matrix + 1, block.start : block.stop]
        elif len(info.shape) < 2:
            part = self.tensor(name, info)
        else:
            part = part[block.start : block.stop]
        return part.reshape(block.stop - block.start, stack_of(info.shape)[2])


class Recount:
    """The proof of one merge; ``run`` once."""

    def __init__(
        self,
        base: Path,
        adapters: Sequence[Path],
        merged: Path,
        dtype: Dtype | None = None,
        rounding: str | None = None,
    ) -> None:
        """``rounding``: the 4-bit type that the base's linear layers were rounded to before anything was added."""
        self._base = tensor_headers(base)
        self._folder = merged
        self._dtype = STORED[dtype] if dtype else None
        self._rounding = rounding
        self._rounded = quantised_weights(self._base) if rounding else frozenset()
        self._changes: dict[str, list[_Change]] = {}
        self._alive: dict[str, bool] = {}
        self._lengths: dict[tuple[str, int, int], Any] = {}
        self._lock = threading.Lock()
        self.found = Findings()
        config, reader, squares = read_config(base), Reader(), 0.0
        for number, folder in enumerate(adapters):
            adapter = read_adapter(folder)
            reading = SecondReading(adapter.config, adapter.tensors, self._base, config.get("hidden_size"))
            for item in map(reading.of, place(adapter.config, adapter.tensors, self._base, config)):
                names = (*item.names, *((item.magnitude,) if item.magnitude else ()))
                module = item.module if number == len(adapters) - 1 else f"{item.module} of adapter {number + 1}"
                raw = {name: reader.tensor(name, adapter.tensors[name]) for name in names}
                copy = raw[names[0]] if item.kind == "whole" else None
                change = _Change(module, item, {name: tensor.float() for name, tensor in raw.items()}, copy)
                self._changes.setdefault(item.target, []).append(change)
                square = _square(change) if item.kind == "low_rank" else 0.0
                squares += square
                self._alive[module] = self._alive.get(module, False) or square > 0
        self.found.norm = squares**0.5
        self._sources = dict(self._base)
        if HEAD not in self._base and tied(config) and (embedding := embedding_of(self._base)):
            self._sources[HEAD] = self._base[embedding]
        embedding = embedding_of(self._base)
        self._names = {HEAD: embedding or HEAD} if HEAD not in self._base else {}
        self._drop_copies(reader)
        over = embedding is not None and tied(config) and bool({HEAD, embedding} & self._changes.keys())
        self._parted = over and not _alike(self._changes.get(embedding or "", ()), self._changes.get(HEAD, ()))
        self._config = config

    def run(self, told: Callable[[int, int], None] = lambda done, total: None) -> Findings:
        """Compares everything; ``told(done, total)`` counts bytes of the merged model."""
        found = self.found
        self._merged = self._headers()
        wanted = self._base.keys() | ({HEAD} if self._parted else set())
        found.missing = sorted(wanted - self._merged.keys())
        found.extra = sorted(self._merged.keys() - wanted)
        self._check_config()
        shared = sorted(self._merged.keys() & self._sources.keys())
        found.tensors, found.changed = len(shared), len(self._changes.keys() & set(shared))
        tasks = self._tasks(shared)
        total = sum(self._merged[name].bytes for name in shared)
        self._done = 0
        with ThreadPoolExecutor(threads := set_threads()) as pool:
            for future in [pool.submit(self._work, tasks) for _ in range(threads)]:
                while not _ended(future):
                    told(self._done, total)
                future.result()
        for names in (found.wrong, found.non_finite, found.overflowed):
            names[:] = sorted(set(names))
        found.modules = len(self._alive)
        found.dead = sorted(module for module, alive in self._alive.items() if not alive)
        return found

    def _check_config(self) -> None:
        """The base's, but for the dtype and for a head that is no longer the embedding."""

        def plain(config: Mapping[str, Any]) -> dict[str, Any]:
            inner = config.get("text_config")
            rest = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype", _TIED)}
            return rest | ({"text_config": plain(inner)} if isinstance(inner, Mapping) else {})

        try:
            config = read_config(self._folder)
        except RunError as error:
            self.found.files.append(error.message)
            return
        if plain(config) != plain(self._config) or tied(config) != (tied(self._config) and not self._parted):
            self.found.files.append("config.json is not that of the base")

    def _drop_copies(self, reader: Reader) -> None:
        """Copies of the base that peft stores beside an embedding's factors change nothing."""
        import torch

        for name, changes in list(self._changes.items()):
            first = changes[0].placed
            if first.kind == "whole" and ".base_layer." in first.names[0]:
                copy = changes[0].copy
                own = reader.tensor(self._names.get(name, name), self._sources[name])
                if torch.equal(own.to(copy.dtype), copy):
                    self._changes[name] = changes[1:]
            if not self._changes[name]:
                del self._changes[name]

    def _headers(self) -> dict[str, TensorInfo]:
        """Of the merged model, with what is wrong with its files. No file beside those that the index names."""
        names = {path.name for path in self._folder.glob("*.safetensors")}
        try:
            index = json.loads((self._folder / INDEX).read_bytes())["weight_map"]
        except FileNotFoundError:
            index = None
        wanted = set(index.values()) if index else {"model.safetensors"}
        self.found.files += [f"{name} is missing" for name in sorted(wanted - names)]
        self.found.files += [f"{name} belongs to no model" for name in sorted(names - wanted)]
        try:
            headers = tensor_headers(self._folder)
        except RunError as error:
            self.found.files.append(error.message)
            return {}
        for name, info in headers.items():
            if index and index.get(name) != info.path.name:
                self.found.files.append(f"{name} is not where the index says")
        ends: dict[Path, int] = {}
        for info in headers.values():
            ends[info.path] = max(ends.get(info.path, 0), info.end)
        longer = [path.name for path, end in ends.items() if path.stat().st_size != end]
        self.found.files += [f"{name} is longer than its tensors" for name in longer]
        return headers

    def _tasks(self, names: Sequence[str]) -> Iterator[tuple[str, Block | None]]:
        for name in names:
            source, merged = self._sources[name], self._merged[name]
            dtype = self._dtype if self._dtype and source.dtype in TORCH else source.dtype
            if merged.dtype != dtype or merged.shape != source.shape:
                self.found.wrong.append(name)
            elif dtype in TORCH:
                yield from ((name, block) for block in blocks(source.shape))
            else:
                yield name, None

    def _work(self, tasks: Iterator[tuple[str, Block | None]]) -> None:
        import torch

        torch.set_num_threads(1)
        reader = Reader()
        while True:
            with self._lock:
                task = next(tasks, None)
            if task is None:
                return
            name, block = task
            if block is None:
                pair = (
                    reader.tensor(self._names.get(name, name), self._sources[name]),
                    reader.tensor(name, self._merged[name]),
                )
                if not torch.equal(*(part.reshape(-1).view(torch.uint8) for part in pair)):
                    self.found.wrong.append(name)
                continue
            self._compare(reader, name, block)
            merged = self._merged[name]
            with self._lock:
                self._done += (
                    (block.stop - block.start) * stack_of(merged.shape)[2] * (merged.bytes // max(1, _count(merged)))
                )

    def _compare(self, reader: Reader, name: str, block: Block) -> None:
        import torch

        merged = reader.rows(name, self._merged[name], block)
        before = reader.rows(self._names.get(name, name), self._sources[name], block)
        if name not in self._changes and name not in self._rounded and before.dtype == merged.dtype:
            expected = before
            finite = True if is_finite(merged) else None
        else:
            exact = self._expected(reader, name, before.to(torch.float32), block)
            expected = exact.to(merged.dtype)
            finite = True if is_finite(merged) else bool(torch.isfinite(exact).all())
        if not torch.equal(expected.reshape(-1).view(torch.uint8), merged.reshape(-1).view(torch.uint8)):
            self.found.wrong.append(name)
        if not is_finite(merged):
            self.found.non_finite.append(name)
            if finite:
                self.found.overflowed.append(name)

    def _expected(self, reader: Reader, name: str, rows: Any, block: Block, upto: int | None = None) -> Any:
        """The rows in float32 after all changes, or after the first ``upto``."""
        if name in self._rounded:
            rows = round_trip(rows, self._rounding or "nf4")
        for number, change in enumerate(self._changes.get(name, ())[:upto]):
            placed, tensors = change.placed, change.tensors
            if placed.kind == "whole":
                new = _block_of(tensors[placed.names[0]], block)
                self._see(change, new, rows)
            elif placed.kind == "bias":
                new = rows + tensors[placed.names[0]] * placed.scale
                self._see(change, new, rows)
            elif placed.magnitude is None:
                new = rows + change.product(block)
            else:
                new = self._dora(reader, name, number, change, rows, block)
                self._see(change, new, rows)
            rows = new
        return rows

    def _dora(self, reader: Reader, name: str, number: int, change: _Change, rows: Any, block: Block) -> Any:
        total = rows + change.product(block)
        lengths = change.tensors[change.placed.magnitude or ""].reshape(-1)
        if not change.placed.transposed:
            return total * (lengths[block.start : block.stop] / total.norm(dim=1)).reshape(-1, 1)
        key = (name, number, block.matrix)
        if key not in self._lengths:
            source, squares = self._sources[name], 0.0
            for part in blocks(source.shape):
                if part.matrix == block.matrix:
                    inner = reader.rows(self._names.get(name, name), source, part).float()
                    inner = self._expected(reader, name, inner, part, number) + change.product(part)
                    squares = squares + inner.double().square().sum(0)
            self._lengths[key] = squares.sqrt().float()  # type: ignore[attr-defined]
        return total * (lengths / self._lengths[key]).reshape(1, -1)

    def _see(self, change: _Change, new: Any, old: Any) -> None:
        """A change that no norm of factors tells: alive when some value moved by more than a rounding."""
        if not self._alive[change.module] and float((new - old).abs().max()) > _NOTHING * float(old.abs().max()):
            self._alive[change.module] = True


def _alike(embedding: Sequence[_Change], head: Sequence[_Change]) -> bool:
    """Whether a head that is the embedding stays it: both are changed by the same."""
    import torch

    def same(left: _Change, right: _Change) -> bool:
        one, other = left.placed, right.placed
        if (one.kind, one.scale, one.magnitude, other.magnitude) != (other.kind, other.scale, None, None):
            return False
        if one.kind == "whole":
            return bool(torch.equal(left.copy, right.copy))
        (b, a), (d, c) = left.pair(0), right.pair(0)
        return bool(torch.equal(b.T, c)) and bool(torch.equal(a.T, d))

    return len(embedding) == len(head) and all(map(same, embedding, head))


def _square(change: _Change) -> float:
    """Squared Frobenius norm of scale · B · A over all matrices, from the small products BᵀB and AAᵀ alone."""
    total = 0.0
    matrices = range(change.placed.experts) if change.placed.expert is None else [change.placed.expert]
    for matrix in matrices:
        b, a = (part.double() for part in change.pair(matrix))
        square = float(((b.T @ b) * (a @ a.T)).sum())
        noise = 1e-24 * float(b.square().sum() * a.square().sum())  # of sums in float64 that should be zero
        total += square if square > noise or square != square else 0.0
    return total * change.placed.scale**2


def _block_of(tensor: Any, block: Block) -> Any:
    if tensor.dim() == 3:
        return tensor[block.matrix, block.start : block.stop]
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor[block.start : block.stop]


def is_finite(rows: Any) -> bool:
    """Whether no value is NaN or infinite: a finite sum says so at once."""
    import torch

    return bool(torch.isfinite(rows.sum(dtype=torch.float32))) or bool(torch.isfinite(rows).all())


def _count(info: TensorInfo) -> int:
    matrices, rows, columns = stack_of(info.shape)
    return matrices * rows * columns


def _ended(future: Any) -> bool:
    try:
        future.exception(0.2)
    except TimeoutError:
        return False
    return True
