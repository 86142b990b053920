"""Answers of a model to prompts, in batches of like length, and what is compared between two models."""

from collections.abc import Sequence
from typing import Any

from app.catalog import RunContext
from workers.loading.ppo_math import answer_mask
from workers.loading.prompts import Prompt
from workers.loading.rollouts import drawing_plainly, left_padded


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    ctx: RunContext,
    *,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    stops: set[int],
    seed: int,
) -> list[str]:
    """One answer to each prompt, in their order. Temperature 0 takes the likeliest token each time.

    With a temperature what is drawn depends on ``seed`` and the order of the prompts alone, so two models answer with
    the same random numbers.
    """
    import torch
    from transformers import GenerationConfig

    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    pad = tokenizer.pad_token_id
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=sorted(stops), pad_token_id=pad, **how)
    torch.manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].ids))
    found: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = left_padded([prompts[row].ids for row in rows], pad, model.device)
        with torch.inference_mode(), drawing_plainly(model):
            whole = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        new = whole[:, ids.shape[1] :]
        kept = answer_mask(new, stops).bool()
        for row, tokens, real in zip(rows, new, kept, strict=True):
            found[row] = tokenizer.decode(tokens[real], skip_special_tokens=True)
        ctx.tick()
        ctx.progress(len(found), len(prompts))
    return [found[row] for row in range(len(prompts))]
