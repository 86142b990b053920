"""Reward models: a language model with one number on top, read at the last token of a conversation."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from app.catalog import RunContext
from app.errors import Code, RunError
from app.files.rows import read_pairs
from app.files.tools import Tool
from app.files.turns import Message, RowError
from app.specs import ModelBlock, TrainSpec
from workers.loading import chat
from workers.loading.adapters import CONFIG_FILE
from workers.loading.devices import Compute, device_and_dtype
from workers.loading.fresh import attach_adapter
from workers.loading.learning import held_rows
from workers.loading.models import differentiable, refuse_quantised
from workers.loading.prepared import origin, read_rows, rows_file, rows_of
from workers.loading.products import quicken
from workers.loading.row_losses import precision, softplus
from workers.loading.speedups import attention
from workers.loading.weights import tensor_headers

HEAD = "score"


class Scorer(NamedTuple):
    """A reward model that is ready to judge, with the tokenizer whose template it was trained with."""

    model: Any
    tokenizer: Any


def load_trainable(directory: Path, block: ModelBlock, ctx: RunContext) -> tuple[Any, Compute]:
    """The base of a training spec with a fresh head: LoRA, QLoRA, or all weights. Raises RunError.

    The head is always trained whole and in float32.
    """
    quantization = block.quantization_config
    requested = block.dtype or (quantization.bnb_4bit_compute_dtype if quantization else None)
    compute = device_and_dtype(requested, ctx, "model.dtype")
    refuse_quantised(directory, "trained", block.model_name_or_path)
    how = attention(block, compute, ctx)
    if block.peft_config is None:
        return quicken(_load(directory, compute, dtype="float32", attn=how), compute), compute
    model = _load(directory, compute, quantization=quantization, attn=how)
    return quicken(attach_adapter(model, block.peft_config, ctx, task_type="SEQ_CLS"), compute), compute


def load_scorer(directory: Path, base: Path | None, compute: Compute, tokenizer: Any) -> Scorer:
    """A finished reward model: whole, or an adapter on ``base``. Frozen. Raises RunError model_invalid."""
    if (directory / CONFIG_FILE).is_file():
        from peft import PeftModel

        if base is None:
            raise RunError(Code.MODEL_INVALID, f"the base of {directory.name} is not known", param="reward_model")
        model = PeftModel.from_pretrained(_load(base, compute), directory, is_trainable=False)
    else:
        model = _load(directory, compute, whole=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return Scorer(model.eval(), tokenizer)


def _load(
    directory: Path,
    compute: Compute,
    *,
    dtype: str | None = None,
    quantization: Any = None,
    whole: bool = False,
    attn: str | None = None,
) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig
    from transformers import logging as transformers_logging

    tensor_headers(directory)
    extra: dict[str, Any] = {"attn_implementation": attn} if attn else {}
    if quantization:
        extra["device_map"] = {"": compute.device}
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=compute.torch_dtype,
            bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
            llm_int8_skip_modules=[HEAD],
        )
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # that the head is new and the LM head unused is meant so
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            directory,
            num_labels=1,
            dtype=getattr(torch, dtype or compute.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **extra,
        )
    except (OSError, ValueError, KeyError) as error:
        raise RunError(Code.MODEL_INVALID, f"{directory.name} cannot be loaded: {error}") from error
    finally:
        transformers_logging.set_verbosity(level)
    missing = sorted(key for key in loaded["missing_keys"] if whole or not key.startswith(f"{HEAD}."))
    if missing:
        raise RunError(Code.MODEL_INVALID, f"{directory.name} lacks {len(missing)} tensors, e.g. {missing[0]}")
    if not hasattr(model, HEAD):
        raise RunError(Code.MODEL_INVALID, f"{type(model).__name__} has no {HEAD} head", param="model")
    return differentiable(model) if quantization else model.to(compute.device)


def scores(model: Any, input_ids: Any, attention_mask: Any) -> Any:
    """One number for each row (batch,), read at its last token, whichever side is padded.

    transformers finds that token by the pad token's id, which fails where padding is the end token.
    """
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = getattr(inner, inner.base_model_prefix)
    hidden = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask * places).argmax(dim=1)
    pooled = hidden[torch.arange(len(last), device=last.device), last]
    head = getattr(inner, HEAD)
    return head(pooled.to(next(head.parameters()).dtype)).squeeze(-1).float()


def pair_measure(
    model: Any, pairs: Any, spec: TrainSpec, compute: Compute, ctx: RunContext
) -> Callable[[], dict[str, list[float]]]:
    """For the learning check: loss (Bradley-Terry), accuracy and margin of held-out pairs."""
    lengths = [max(map(len, both)) for both in zip(pairs["chosen_ids"], pairs["rejected_ids"], strict=True)]
    rows = pairs[held_rows(lengths, spec.training.seed)]

    def measure() -> dict[str, list[float]]:
        answers = [*rows["chosen_ids"], *rows["rejected_ids"]]
        batch_size = spec.training.per_device_eval_batch_size
        found = row_rewards(model, answers, compute=compute, batch_size=batch_size, ctx=ctx)
        half = len(found) // 2
        margins = [good - bad for good, bad in zip(found[:half], found[half:], strict=True)]
        return {
            "margin": margins,
            "accuracy": [float(margin > 0) for margin in margins],
            "loss": [softplus(-margin) for margin in margins],
        }

    return measure


def row_rewards(
    model: Any, rows: Sequence[Sequence[int]], *, compute: Compute, batch_size: int, ctx: RunContext
) -> list[float]:
    """The reward of each row of token ids, in their order. Rows of like length share a batch."""
    import torch

    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    found: dict[int, float] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(rows[row]) for row in chosen)
        ids = torch.tensor([[*rows[row], *[0] * (longest - len(rows[row]))] for row in chosen], device=model.device)
        real = [[1] * len(rows[row]) + [0] * (longest - len(rows[row])) for row in chosen]
        with precision(compute):
            judged = scores(model, ids, torch.tensor(real, device=model.device))
        found |= zip(chosen, judged.tolist(), strict=True)
        ctx.tick()
    return [found[row] for row in range(len(rows))]


def render(messages: list[Message], tokenizer: Any, tools: Sequence[Tool] = ()) -> list[int]:
    """A conversation as the reward model reads it: with its own template, or question and answer as they are."""
    if tokenizer.chat_template:
        text = chat.render(messages, tokenizer, tools)
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    text = "\n".join(turn["content"] for turn in messages)
    return [*tokenizer(text).input_ids, tokenizer.eos_token_id]


def load_pairs(path: Path, tokenizer: Any, *, max_length: int, ctx: RunContext, field: str) -> Any:
    """A ``datasets.Dataset`` of ``chosen_ids`` and ``rejected_ids``; pairs that are too long are left out, and counted.

    Cutting one of two answers would change which is better. Raises RunError bad_data.
    """
    return read_rows(pairs_file(path, tokenizer, max_length=max_length, ctx=ctx, field=field))


def pairs_file(path: Path, tokenizer: Any, *, max_length: int, ctx: RunContext, field: str) -> Path:
    """What ``load_pairs`` reads, as a file; for ``prepare``."""

    def made_from() -> dict[str, Any]:
        return origin(path, tokenizer, shape="pairs", max_length=max_length)

    return rows_file(ctx, field, made_from, rows_of(lambda: _pairs(path, tokenizer, max_length, ctx, field)))


def _pairs(path: Path, tokenizer: Any, max_length: int, ctx: RunContext, field: str) -> dict[str, list[list[int]]]:
    chosen: list[list[int]] = []
    rejected: list[list[int]] = []
    total = dropped = 0
    for total, (good, bad) in enumerate(_rendered(path, tokenizer, field), 1):  # noqa: B007 - read below
        if max(len(good), len(bad)) > max_length:
            dropped += 1
            continue
        chosen.append(good)
        rejected.append(bad)
    if not chosen:
        raise RunError(
            Code.BAD_DATA,
            f"nothing is left to learn: all {total} pairs are longer than {max_length} tokens",
            hint="raise training.max_length or shorten the conversations",
            param=field,
        )
    if dropped:
        message = f"{dropped} of {total} pairs are longer than {max_length} tokens and were left out"
        ctx.event("rows_dropped", message, level="warn", dropped=dropped, max_length=max_length)
    tokens = sum(map(len, chosen)) + sum(map(len, rejected))
    ctx.event("dataset_loaded", f"{field}: {len(chosen)} pairs, {tokens:,} tokens", rows=len(chosen), tokens=tokens)
    return {"chosen_ids": chosen, "rejected_ids": rejected}


def _rendered(path: Path, tokenizer: Any, field: str) -> Iterable[tuple[list[int], list[int]]]:
    number = 0
    try:
        for number, pair in enumerate(read_pairs(path), 1):  # noqa: B007 - read in the handler
            good, bad = (
                render(pair.messages + answer, tokenizer, pair.tools) for answer in (pair.chosen, pair.rejected)
            )
            yield good, bad
    except RowError as error:
        raise RunError(Code.BAD_DATA, str(error), param=field) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise RunError(Code.BAD_DATA, f"row {number}: the chat template refuses it: {error}", param=field) from error
