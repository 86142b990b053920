"""Answers of a model to prompts, in batches of like length, and what is compared between two models."""

from collections.abc import Sequence
from typing import Any

from app.catalog import Interrupted, RunContext
from workers.loading.ppo_math import answer_mask
from workers.loading.prompts import Prompt
from workers.loading.rollouts import drawing_plainly, left_padded
from workers.loading.said import Said


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    ctx: RunContext,
    said: Said,
    *,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    stops: set[int],
    seed: int,
) -> list[str]:
    """One answer to each prompt, in their order. Temperature 0 takes the likeliest token each time.

    With a temperature what is drawn depends on ``seed`` and the place of the batch alone, so two models answer with the
    same random numbers, and so does an attempt that goes on: batches in ``said`` are not made again. Raises Interrupted
    between two batches when the run is to stop.
    """
    import torch
    from transformers import GenerationConfig

    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    pad = tokenizer.pad_token_id
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=sorted(stops), pad_token_id=pad, **how)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].ids))
    done = 0
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        done += len(rows)
        if all(str(row) in said for row in rows):
            continue
        if ctx.stop_requested():
            raise Interrupted
        torch.manual_seed(seed + start)
        ids, mask = left_padded([prompts[row].ids for row in rows], pad, model.device)
        with torch.inference_mode(), drawing_plainly(model):
            whole = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        new = whole[:, ids.shape[1] :]
        kept = answer_mask(new, stops).bool()
        for row, tokens, real in zip(rows, new, kept, strict=True):
            said[str(row)] = tokenizer.decode(tokens[real], skip_special_tokens=True)
        ctx.tick()
        ctx.progress(done, len(prompts))
    return [said[str(row)] for row in range(len(prompts))]
