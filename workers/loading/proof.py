"""How much of an adapter's effect a merged model keeps, measured on logits."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from workers.loading.weights import tensor_headers

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three prime numbers above ten.",
    "Translate to German: good morning.",
    "4096",
    "Explain in simple words why the sky is blue.",
    "def fibonacci(n):",
    "Summarise: the meeting moved from Monday to Thursday because two people were ill.",
)
# Below this, the difference between tuned and base is the noise of float32 and says nothing.
MIN_KL = 1e-8


class Effect(NamedTuple):
    """What a merge kept. KL divergences in nats per token."""

    kl_tuned_base: float
    kl_tuned_merged: float
    retained: float | None
    """1 − KL(tuned‖merged) / KL(tuned‖base); None where the adapter changes nothing that can be measured."""
    top1_agreement: float
    max_abs_difference: float
    """Of the logits, tuned against merged."""
    tokens: int


def prompt_ids(tokenizer: Any, prompts: Sequence[str] = PROMPTS) -> list[list[int]]:
    """The prompts as a server would see them: rendered by the chat template, if there is one."""
    if not tokenizer.chat_template:
        return [tokenizer(prompt).input_ids for prompt in prompts]
    rendered = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    return [tokenizer(text, add_special_tokens=False).input_ids for text in rendered]


def logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[Any]:
    """Float32 logits on the CPU, one tensor [tokens, vocabulary] per prompt, from one padded batch."""
    import torch

    longest = max(len(ids) for ids in prompts)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in prompts], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in prompts], device=model.device)
    model.eval()
    with torch.inference_mode():
        output = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return [output[index, : len(row)].float().cpu() for index, row in enumerate(prompts)]


def compare(tuned: Sequence[Any], base: Sequence[Any], merged: Sequence[Any]) -> Effect:
    """The effect kept by ``merged``, over all positions of all prompts; float64, because the divergences are tiny."""
    import torch

    stacked = [torch.cat(list(part)) for part in (tuned, base, merged)]
    logs = [torch.log_softmax(part.double(), dim=-1) for part in stacked]
    kl_base, kl_merged = (float((logs[0].exp() * (logs[0] - other)).sum(-1).mean()) for other in logs[1:])
    return Effect(
        kl_tuned_base=kl_base,
        kl_tuned_merged=kl_merged,
        # Not "kl_base < MIN_KL": NaN must not pass as a small effect.
        retained=1 - kl_merged / kl_base if kl_base >= MIN_KL or not math.isfinite(kl_base) else None,
        top1_agreement=float((stacked[0].argmax(-1) == stacked[2].argmax(-1)).double().mean()),
        max_abs_difference=float((stacked[0] - stacked[2]).abs().max()),
        tokens=len(stacked[0]),
    )


def changed_tensors(before: Path, after: Path) -> tuple[set[str], set[str]]:
    """Names of the tensors that differ between two model folders, and of those that only one of them has.

    The values of ``before`` are rounded to the dtype of ``after`` first, so that a mere change of dtype is no change.
    """
    import torch
    from safetensors.torch import safe_open

    left, right = tensor_headers(before), tensor_headers(after)
    changed = set()
    for name in left.keys() & right.keys():
        with (
            safe_open(str(left[name].path), framework="pt") as old,
            safe_open(str(right[name].path), framework="pt") as new,
        ):
            value = new.get_tensor(name)
            if not torch.equal(old.get_tensor(name).to(value.dtype), value):
                changed.add(name)
    return changed, left.keys() ^ right.keys()
