"""How much of an adapter's effect a merged model keeps, measured on logits."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
_BLOCK = 1 << 19
"""Logits of a model that are compared at a time: 4 MiB in float64, of which about ten are alive at once."""


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
    """The effect kept by ``merged``, over all positions of all prompts; float64, because the divergences are tiny.

    A few positions at a time: with a large vocabulary, all of them in float64 are gigabytes.
    """
    import torch

    positions = max(1, _BLOCK // tuned[0].shape[-1])
    kl_base = kl_merged = same = largest = 0.0
    tokens = 0
    for parts in zip(tuned, base, merged, strict=True):
        for three in zip(*(part.split(positions) for part in parts), strict=True):
            logs = [torch.log_softmax(part.double(), dim=-1) for part in three]
            weights = logs[0].exp()
            kl_base += float((weights * (logs[0] - logs[1])).sum())
            kl_merged += float((weights * (logs[0] - logs[2])).sum())
            same += float((three[0].argmax(-1) == three[2].argmax(-1)).sum())
            difference = float((three[0] - three[2]).abs().max())
            largest = difference if not difference <= largest else largest
            tokens += len(three[0])
    kl_base, kl_merged = kl_base / tokens, kl_merged / tokens
    return Effect(
        kl_tuned_base=kl_base,
        kl_tuned_merged=kl_merged,
        # Not "kl_base < MIN_KL": NaN must not pass as a small effect.
        retained=1 - kl_merged / kl_base if kl_base >= MIN_KL or not math.isfinite(kl_base) else None,
        top1_agreement=same / tokens,
        max_abs_difference=largest,
        tokens=tokens,
    )
