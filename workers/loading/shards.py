"""Safetensors shards, written as a stream: planned, filled by all cores, hashed and made durable on the way.

A shard is written under a name of its own, and gets its final name and a record with its digest once it is on disk. A
later attempt at the same merge finds both and writes only the shards that are missing.
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from app.storage import sha256_of, sync_dir, write_private
from workers.loading.deltas import TORCH, WIDTHS, Block, Mapped, blocks, changed, stack_of
from workers.loading.weights import TensorInfo

INDEX = "model.safetensors.index.json"
_ALIGNMENT = 8
_CHUNK = 8 << 20
_PENDING = 16
_SYNC_EVERY = 128 << 20
_POLL = 0.2


class Output(NamedTuple):
    """A tensor of the merged model: where it comes from, as what it is stored, and what changes it."""

    name: str
    source: TensorInfo
    dtype: str
    steps: tuple[Any, ...] = ()
    """``deltas.Step``, or what is applied as they are."""

    @property
    def copied(self) -> bool:
        """Whether its bytes are those of the source."""
        return not self.steps and self.dtype == self.source.dtype

    @property
    def bytes(self) -> int:
        """Size as stored."""
        if self.dtype == self.source.dtype:
            return self.source.bytes
        return self.source.bytes // WIDTHS[self.source.dtype] * WIDTHS[self.dtype]


class Shard(NamedTuple):
    """A file of the merged model."""

    name: str
    header: bytes
    """What stands before the first tensor, length included."""
    outputs: tuple[Output, ...]
    """In the order of their bytes."""

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(output.bytes for output in self.outputs)


def plan(outputs: Sequence[Output], most: int) -> list[Shard]:
    """Outputs spread over files of at most ``most`` bytes of tensors, in their order; one alone may be larger."""
    groups: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if groups[-1] and size + output.bytes > most:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.bytes
    count = len(groups)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    return [
        _shard(name, group) for name, group in zip(names if count > 1 else ["model.safetensors"], groups, strict=True)
    ]


def _shard(name: str, outputs: Sequence[Output]) -> Shard:
    """The widest dtype first, so that every tensor lies on a multiple of its width; then by name."""
    ordered = sorted(outputs, key=lambda output: (-output.bytes // max(1, math.prod(output.source.shape)), output.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for output in ordered:
        shape, end = list(output.source.shape), offset + output.bytes
        header[output.name] = {"dtype": output.dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return Shard(name, len(text).to_bytes(8, "little") + text, tuple(ordered))


def index_of(shards: Sequence[Shard]) -> bytes | None:
    """The index that loaders read where there are several files."""
    if len(shards) == 1:
        return None
    size = sum(output.bytes for shard in shards for output in shard.outputs)
    files = {output.name: shard.name for shard in shards for output in shard.outputs}
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def pieces(output: Output, base: Mapped) -> Iterator[tuple[int, Callable[[], Any]]]:
    """The tensor's bytes from first to last: how many, and what works them out when it is called."""
    if output.copied:
        for start in range(0, output.source.bytes, _CHUNK):
            stop = min(start + _CHUNK, output.source.bytes)
            yield stop - start, partial(base.bytes, output.source, start, stop)
        return
    width = stack_of(output.source.shape)[2] * WIDTHS[output.dtype]
    for block in blocks(output.source.shape):
        yield (block.stop - block.start) * width, partial(_merged, output, base, block)


def _merged(output: Output, base: Mapped, block: Block) -> Any:
    import torch

    rows = changed(output.steps, base.floats(output.source, block), block)
    return rows.to(getattr(torch, TORCH[output.dtype])).contiguous().view(-1).view(torch.uint8)


@dataclass
class _Open:
    """A shard that is being filled: pieces come in any order, are written where they belong and hashed in order."""

    shard: Shard
    path: Path
    count: int = 0
    """Pieces handed out; final once ``closed``."""
    closed: bool = False
    hashed: int = 0
    hashing: bool = False
    unsynced: int = 0
    pending: dict[int, tuple[Any, TensorInfo | None]] = field(default_factory=dict)
    settled: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        # A disk without room for it says so now.
        os.posix_fallocate(self.fd, 0, self.shard.bytes)
        self.digest = hashlib.sha256(self.shard.header)
        write_at(self.fd, self.shard.header, 0)

    def add(self, number: int, view: Any, last_of: TensorInfo | None, base: Mapped) -> bool:
        """Takes a written piece; whoever brings the next one in order hashes on. True when that was the last."""
        with self.settled:
            self.pending[number] = (view, last_of)
            self.unsynced += len(view)
            if self.hashing:
                while self.hashing and len(self.pending) > _PENDING:
                    self.settled.wait(_POLL)
                return False
            self.hashing = True
        while True:
            with self.settled:
                piece = self.pending.pop(self.hashed, None)
                if piece is None:
                    self.hashing = False
                    self.settled.notify_all()
                    return self.closed and self.hashed == self.count
            self.digest.update(piece[0])
            if piece[1] is not None:
                base.release(piece[1])
            with self.settled:
                self.hashed += 1
                self.settled.notify_all()


class _Task(NamedTuple):
    """A piece of a shard: which one, where it goes, what works it out, and the tensor that ends with it."""

    opened: _Open
    number: int
    offset: int
    piece: Callable[[], Any]
    last_of: TensorInfo | None = None


def write_at(fd: int, data: Any, offset: int) -> None:
    """All of it: the kernel writes at most 2 GiB at a time."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


class Stream:
    """Writes shards with ``threads`` threads. ``told(bytes)`` hears of what is done; ``stop()`` is asked meanwhile."""

    def __init__(
        self,
        shards: Sequence[Shard],
        folder: Path,
        key: str,
        *,
        threads: int,
        told: Callable[[int], None],
        stop: Callable[[], bool],
    ) -> None:
        self._shards = shards
        self._folder = folder
        self._key = key
        self._threads = threads
        self._told = told
        self._stop = stop
        self._lock = threading.Lock()
        self._done = 0
        self._open: list[_Open] = []
        self._over = threading.Event()
        self.digests: dict[str, str] = {}

    def run(self) -> bool:
        """Fills the folder; False when it was asked to stop. Raises whatever went wrong in a thread."""
        import torch

        missing = self._missing()
        base = Mapped()
        tasks = self._tasks(missing, base)
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(self._threads + 1) as pool:
                syncing = pool.submit(self._sync)
                working = [pool.submit(self._work, tasks, base) for _ in range(self._threads)]
                try:
                    for future in working:
                        while self._asked() or not _ended(future, _POLL):
                            self._told(self._done)
                            if self._over.is_set():
                                break
                    stopped = self._over.is_set()
                finally:
                    self._over.set()
                for future in (*working, syncing):
                    future.result()
        finally:
            torch.set_num_threads(before)
            for shard in self._open:
                os.close(shard.fd)
        self._told(self._done)
        return not stopped

    def _asked(self) -> bool:
        if self._stop():
            self._over.set()
        return self._over.is_set()

    def _missing(self) -> list[Shard]:
        """Shards that no earlier attempt has left whole, by their record and their bytes."""

        def whole(shard: Shard) -> str | None:
            path = self._folder / shard.name
            try:
                record = json.loads(path.with_name(f"{shard.name}.json").read_bytes())
                digest = str(record["sha256"])
                return digest if record["key"] == self._key and sha256_of(path) == digest else None
            except (OSError, ValueError, KeyError, TypeError):
                return None

        self._folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self._threads) as pool:
            found = dict(zip((shard.name for shard in self._shards), pool.map(whole, self._shards), strict=True))
        self.digests = {name: digest for name, digest in found.items() if digest}
        self._done = sum(shard.bytes for shard in self._shards if shard.name in self.digests)
        return [shard for shard in self._shards if shard.name not in self.digests]

    def _tasks(self, shards: Sequence[Shard], base: Mapped) -> Iterator[_Task]:
        for shard in shards:
            opened = _Open(shard, self._folder / f"{shard.name}.part")
            self._open.append(opened)
            offset = len(shard.header)
            self._done += offset
            # One is held back, so that a shard is known to be closed before its last piece is handed out.
            held: _Task | None = None
            for output in shard.outputs:
                at = offset
                for length, piece in pieces(output, base):
                    if held:
                        yield held
                    held = _Task(opened, opened.count, at, piece)
                    opened.count += 1
                    at += length
                if held and at > offset:
                    held = held._replace(last_of=output.source)
                offset += output.bytes
            opened.closed = True
            if held:
                yield held
            else:
                self._finish(opened)

    def _work(self, tasks: Iterator[_Task], base: Mapped) -> None:
        import torch

        torch.set_num_threads(1)
        try:
            while not self._over.is_set():
                with self._lock:
                    task = next(tasks, None)
                if task is None:
                    return
                opened = task.opened
                view = memoryview(task.piece().numpy())
                write_at(opened.fd, view, task.offset)
                complete = opened.add(task.number, view, task.last_of, base)
                with self._lock:
                    self._done += len(view)
                if complete:
                    self._finish(opened)
        except BaseException:
            self._over.set()
            raise

    def _finish(self, opened: _Open) -> None:
        os.fsync(opened.fd)
        name = opened.shard.name
        os.rename(opened.path, self._folder / name)
        sync_dir(self._folder)
        self.digests[name] = opened.digest.hexdigest()
        record = {"key": self._key, "sha256": self.digests[name]}
        write_private(self._folder / f"{name}.json", json.dumps(record).encode())

    def _sync(self) -> None:
        """Sends what is written to the disk while the rest is worked out."""
        while not self._over.wait(_POLL / 4):
            for opened in list(self._open):
                if opened.unsynced >= _SYNC_EVERY:
                    opened.unsynced = 0
                    os.fdatasync(opened.fd)


def _ended(future: Any, seconds: float) -> bool:
    try:
        future.exception(seconds)
    except TimeoutError:
        return False
    return True
