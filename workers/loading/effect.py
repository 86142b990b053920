"""Logits of base, tuned and merged model in float32, with the memory of none of them.

The weights stay in their files, which are mapped; each matrix is widened to float32 by rows while it is used. The
tuned model is peft's own, so that the reference shares nothing with what merges. Logits lie in files too, from the
moment that the output layer writes them: eight prompts of a model with 150 000 tokens are 150 MB.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from app.errors import Code, RunError
from workers.loading.chain import attach
from workers.loading.devices import set_threads
from workers.loading.models import check_weights
from workers.loading.nf4 import round_trip
from workers.loading.proof import Effect, compare
from workers.loading.weights import stored_dtype, tensor_headers

MOST_WIDENED = 256 << 20
"""Bytes of float32 that weights outside matrices and embeddings may take: norms do, the experts of a layer do not."""
_ROWS = 1 << 22
_LOGITS = 64 << 20
"""Bytes of the logits of one batch; they lie in a file, and a few models make a copy or two of them."""


class TooLarge(Exception):
    """The model cannot be run within the memory of a merge; says why."""


def measure_effect(
    start: Path,
    adapter: Path,
    merged: Path,
    prompts: Sequence[Sequence[int]],
    spool: Path,
    *,
    quantization: str | None = None,
    rounded: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Effect, Effect | None]:
    """What ``merged`` keeps of what the adapter does to ``start``; both loaded from disk. Raises TooLarge, RunError.

    ``quantization``: the 4-bit type that the adapter was trained on; then the second effect says how far the adapter on
    the rounded base is from the adapter on the base itself. ``rounded``: the merge took the rounded base too, which is
    then what it is held against. ``spool``: a folder for the logits.
    """
    set_threads()
    model = mapped_model(start)
    before, after = (quantization, None) if rounded else (None, quantization)
    base = _spooled(model, prompts, spool / "base", tick, before)
    model = attach(model, adapter)
    tuned = _spooled(model, prompts, spool / "tuned", tick, before)
    near = compare(tuned, base, _spooled(model, prompts, spool / "rounded", tick, after)) if quantization else None
    del model
    found = _spooled(mapped_model(merged), prompts, spool / "merged", tick)
    return compare(tuned, base, found), near


def distances(
    merged: Path,
    models: Sequence[Path],
    prompts: Sequence[Sequence[int]],
    spool: Path,
    *,
    tick: Callable[[], None] = lambda: None,
) -> list[Effect]:
    """How far ``merged`` is from each model, all loaded from disk, one at a time. Raises TooLarge, RunError."""
    set_threads()
    found = _spooled(mapped_model(merged), prompts, spool / "merged", tick)
    effects = []
    for model in models:
        own = _spooled(mapped_model(model), prompts, spool / "model", tick)
        effects.append(compare(own, own, found))
    return effects


def mapped_model(directory: Path) -> Any:
    """A causal language model whose matrices stay in their files; it computes in float32. Raises TooLarge, RunError."""
    import torch
    from transformers import AutoModelForCausalLM

    check_weights(directory)
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, stored_dtype(tensor_headers(directory))),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise RunError(Code.MODEL_INVALID, f"{directory.name} cannot be loaded: {error}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise RunError(Code.MODEL_INVALID, f"{directory.name} lacks {len(missing)} tensors, e.g. {missing[0]}")
    linear, embedding = _wide_classes()
    rest = []
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = linear
        elif isinstance(module, torch.nn.Embedding) and type(module).forward is torch.nn.Embedding.forward:
            module.__class__ = embedding
        else:
            rest += list(module.parameters(recurse=False))
    size = sum(4 * parameter.numel() for parameter in rest)
    if size > MOST_WIDENED:
        raise TooLarge(f"weights that are no plain matrices would take {size / 1e9:.1f} GB in float32")
    for parameter in rest:
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    return model.eval()


def _wide_classes() -> tuple[Any, Any]:
    import torch
    from torch.nn import functional

    class WideLinear(torch.nn.Linear):  # type: ignore[misc]
        """Widens its weight by rows as it goes; ``rounded`` takes them through 4 bit first.

        ``spool``: a flat tensor that the output is written into, where it is large enough.
        """

        rounded: str | None = None
        spool: Any = None

        def forward(self, x: Any) -> Any:
            x = x.float()
            size = max(64, _ROWS // self.in_features // 64 * 64)
            shape, values = (*x.shape[:-1], self.out_features), x.shape[:-1].numel() * self.out_features
            spooled = self.spool is not None and self.spool.numel() >= values
            out = self.spool[:values].view(shape) if spooled else x.new_empty(shape)
            for start in range(0, self.out_features, size):
                rows = self.weight[start : start + size].float()
                rows = round_trip(rows, self.rounded) if self.rounded else rows
                out[..., start : start + size] = functional.linear(x, rows)
            return out if self.bias is None else out.add_(self.bias.float())

    class WideEmbedding(torch.nn.Embedding):  # type: ignore[misc]
        """Widens the rows that are looked up."""

        def forward(self, ids: Any) -> Any:
            return self.weight[ids].float()

    return WideLinear, WideEmbedding


@contextlib.contextmanager
def _rounded(model: Any, kind: str | None) -> Iterator[None]:
    """The model with its linear layers as they were while a QLoRA adapter was trained; as they are for None."""
    head = set(model.get_output_embeddings().modules())
    layers = [module for module in model.modules() if hasattr(type(module), "rounded") and module not in head]
    for layer in layers:
        layer.rounded = kind
    try:
        yield
    finally:
        for layer in layers:
            layer.rounded = None


@contextlib.contextmanager
def _writes_into(model: Any, spool: Any) -> Iterator[None]:
    """The model with an output layer that writes its logits into ``spool``, a flat tensor, instead of into memory."""
    heads = [module for module in model.get_output_embeddings().modules() if hasattr(type(module), "spool")]
    for head in heads:
        head.spool = spool
    try:
        yield
    finally:
        for head in heads:
            head.spool = None


def _spooled(
    model: Any, prompts: Sequence[Sequence[int]], path: Path, tick: Callable[[], None], kind: str | None = None
) -> list[Any]:
    """Float32 logits of each prompt, [tokens, vocabulary], in a file that is memory; ``kind`` rounds the weights."""
    import torch

    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    total = sum(map(len, prompts))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = torch.from_file(str(path), shared=True, size=total * vocabulary, dtype=torch.float32)
    whole = whole.view(total, vocabulary)
    batches = list(_batches(prompts, max(1, _LOGITS // 4 // vocabulary)))
    largest = max(max(map(len, batch)) * len(batch) for batch in batches)
    one = path.with_name("batch")
    spool = torch.from_file(str(one), shared=True, size=largest * vocabulary, dtype=torch.float32)
    found, first = [], 0
    for batch in batches:
        longest = max(map(len, batch))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
        with torch.inference_mode(), _rounded(model, kind), _writes_into(model, spool):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for index, row in enumerate(batch):
                part = whole[first : first + len(row)]
                part.copy_(logits[index, : len(row)])
                found.append(part)
                first += len(row)
        tick()
    one.unlink()
    return found


def _batches(prompts: Sequence[Sequence[int]], most: int) -> Iterator[list[Sequence[int]]]:
    """Neighbours whose padded size is at most so many tokens."""
    batch: list[Sequence[int]] = []
    for prompt in prompts:
        if batch and max(len(prompt), *map(len, batch)) * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def vocabulary_of(directory: Path) -> int | None:
    """Rows of the word embedding, by ``config.json``; None where it does not say."""
    config = json.loads((directory / "config.json").read_bytes())
    inner = config.get("text_config")
    size = config.get("vocab_size") or (inner.get("vocab_size") if isinstance(inner, dict) else None)
    return size if isinstance(size, int) else None
