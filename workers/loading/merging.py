"""A base and adapters on their way to one model: what is written, tensor by tensor, and the files beside it."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import Code, RunError
from app.fit import linear_modules
from app.specs import Dtype
from workers.loading.adapters import layer_digests, read_adapter
from workers.loading.companions import copy_companions, has_tokenizer
from workers.loading.deltas import STORED, Block, Mapped, Step, Steps, blocks, load_steps, measure, width_of
from workers.loading.devices import set_threads
from workers.loading.layout import HEAD, embedding_of, place
from workers.loading.nf4 import round_trip
from workers.loading.shards import INDEX, Output, Shard, Stream, index_of, plan
from workers.loading.weights import TensorInfo, fingerprint, tensor_headers

CONFIG = "config.json"
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Merge:
    """What will be written."""

    base: Path
    adapters: tuple[Path, ...]
    """In the order in which they are added."""
    dtype: Dtype | None
    """None = each tensor as the base stores it."""
    outputs: tuple[Output, ...]
    rounding: str | None
    untied: bool
    """The adapters part a head from the embedding that it was tied to: both are stored."""
    config: bytes
    also: tuple[str, ...] = ()
    """What else the result depends on, in words or digests."""

    def shards(self, most: int) -> list[Shard]:
        """The files of at most ``most`` bytes."""
        return plan(self.outputs, most)

    def key(self, shards: Sequence[Shard]) -> str:
        """What the files depend on: a shard that was left by an earlier attempt counts when this is the same."""
        digest = hashlib.sha256(fingerprint(self.base).encode())
        for part in (*layer_digests(self.adapters), self.config.hex(), self.rounding or "", *self.also):
            digest.update(part.encode())
        for shard in shards:
            digest.update(shard.header)
        return digest.hexdigest()


@dataclass(frozen=True)
class Rounding:
    """The base's linear layers as QLoRA saw them: rounded to 4 bit before anything is added."""

    kind: str
    magnitude: None = None

    def apply(self, rows: Any, block: Block) -> Any:
        """Float32 rows, there and back."""
        return round_trip(rows, self.kind)


def quantised_weights(headers: Mapping[str, TensorInfo]) -> frozenset[str]:
    """Names of the tensors that QLoRA stores in 4 bit: linear layers, less the head."""
    shapes = {name: info.shape for name, info in headers.items()}
    return frozenset(f"{path}.weight" for path in linear_modules(shapes))


def read_merge(
    base: Path, adapters: Sequence[Path], dtype: Dtype | None = None, *, rounding: str | None = None
) -> Merge:
    """Places and loads the adapters. Raises RunError adapter_invalid, base_mismatch, model_invalid.

    ``rounding``: the 4-bit type (nf4, fp4) that the base's linear layers are rounded to first.
    """
    headers = tensor_headers(base)
    config = read_config(base)
    steps: Steps = {}
    for folder in adapters:
        adapter = read_adapter(folder)
        load_steps(place(adapter.config, adapter.tensors, headers, config), adapter.tensors, steps)
    mapped = Mapped()
    sources = dict(headers)
    embedding = embedding_of(headers)
    untied = _parted(steps, config, embedding)
    if HEAD not in headers and HEAD in steps:
        if untied and embedding:
            sources[HEAD] = headers[embedding]
        else:
            del steps[HEAD]
    elif untied and HEAD not in headers and embedding:
        sources[HEAD] = headers[embedding]
    _drop_copies(steps, sources, mapped)
    outputs = []
    rounded = quantised_weights(headers) if rounding else frozenset()
    for name, source in sources.items():
        own: tuple[Any, ...] = (*([Rounding(rounding)] if rounding and name in rounded else []), *steps.get(name, ()))
        if own:
            width_of(source)
            measure(own, source, mapped)
        stored = STORED[dtype] if dtype and source.dtype in STORED.values() else source.dtype
        outputs.append(Output(name, source, stored, own))
    about = _config_bytes(base, config, dtype, untied)
    return Merge(base, tuple(adapters), dtype, tuple(outputs), rounding, untied, about)


def read_config(base: Path) -> dict[str, Any]:
    """``config.json``. Raises RunError model_invalid."""
    try:
        config = json.loads((base / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(Code.MODEL_INVALID, f"{base.name}: {CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise RunError(Code.MODEL_INVALID, f"{base.name}: {CONFIG} is not an object")
    return config


def write_merge(
    merge: Merge,
    folder: Path,
    kept: Path,
    *,
    shard_bytes: int,
    told: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, str] | None:
    """Writes weights and config into ``folder`` and returns the sha256 of each weights file; None when stopped.

    Shards are built in ``kept``, on the same file system, and moved when all are whole.
    """
    shards = merge.shards(shard_bytes)
    total = sum(shard.bytes for shard in shards)
    stream = Stream(
        shards,
        kept,
        merge.key(shards),
        threads=set_threads(),
        told=lambda done: told(done, total),
        stop=stop,
    )
    if not stream.run():
        return None
    for shard in shards:
        (kept / shard.name).rename(folder / shard.name)
        (kept / f"{shard.name}.json").unlink()
    index = index_of(shards)
    if index is not None:
        (folder / INDEX).write_bytes(index)
    (folder / CONFIG).write_bytes(merge.config)
    return stream.digests


def copy_beside(base: Path, adapters: Sequence[Path], folder: Path) -> Path:
    """Copies what belongs to weights; the newest tokenizer counts. Returns the folder that it comes from."""
    tokenizer = next((source for source in (*reversed(adapters), base) if has_tokenizer(source)), base)
    copy_companions(base, folder, tokenizer=tokenizer == base)
    if tokenizer != base:
        copy_companions(tokenizer, folder, others=False)
    return tokenizer


def _parted(steps: Steps, config: Mapping[str, Any], embedding: str | None) -> bool:
    """Whether a head that shares the embedding's weights no longer does."""
    if not tied(config) or embedding is None or not (HEAD in steps or embedding in steps):
        return False
    return not _mirrored(steps.get(embedding, []), steps.get(HEAD, []))


def tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the embedding; transformers' default is that it is."""
    inner = config.get("text_config")
    where = inner if isinstance(inner, Mapping) and "tie_word_embeddings" in inner else config
    return bool(where.get("tie_word_embeddings", True))


def _mirrored(embedding: Sequence[Step], head: Sequence[Step]) -> bool:
    """Whether both are changed alike, as peft does it with ``ensure_weight_tying``."""
    import torch

    def alike(left: Step, right: Step) -> bool:
        if left.placed.kind != right.placed.kind or left.placed.scale != right.placed.scale:
            return False
        if left.placed.kind == "whole":
            return bool(torch.equal(left.mapped.tensor(left.info), right.mapped.tensor(right.info)))
        if left.magnitude is not None or right.magnitude is not None:
            return False
        return bool(torch.equal(left.b.t(), right.a) and torch.equal(left.a.t(), right.b))

    return len(embedding) == len(head) and all(map(alike, embedding, head))


def _drop_copies(steps: Steps, sources: Mapping[str, TensorInfo], base: Mapped) -> None:
    """Takes out the copies of base weights that peft stores beside an embedding's factors, if they are but that."""
    import torch

    for name in list(steps):
        step = steps[name][0]
        if step.placed.kind == "whole" and ".base_layer." in step.placed.names[0]:
            pairs = ((base.rows(sources[name], at), step.mapped.rows(step.info, at)) for at in blocks(step.info.shape))
            if all(torch.equal(own.to(copy.dtype), copy) for own, copy in pairs):
                steps[name] = steps[name][1:]
        if not steps[name]:
            del steps[name]


def _config_bytes(base: Path, config: dict[str, Any], dtype: Dtype | None, untied: bool) -> bytes:
    """The base's own bytes where nothing in them changes."""
    if dtype is None and not untied:
        return (base / CONFIG).read_bytes()
    changed = dict(config)
    inner = changed.get("text_config")
    parts = [changed] + ([inner := dict(inner)] if isinstance(inner, dict) else [])
    if isinstance(inner, dict):
        changed["text_config"] = inner
    for part in parts:
        if dtype is not None:
            known = [key for key in ("dtype", "torch_dtype") if key in part]
            for key in known or (["dtype"] if part is changed else []):
                part[key] = dtype
        if untied and (part is changed or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    return (json.dumps(changed, indent=2) + "\n").encode()
