"""Rollouts: a policy answers prompts, and what is known of the answers is worked out once."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.catalog import RunContext
from app.specs import TrainSpec
from workers.loading.actor_critic import ActorCritic
from workers.loading.judging import Judge, total
from workers.loading.learning import held_rows
from workers.loading.ppo_math import answer_mask
from workers.loading.prompts import Prompt


@dataclass
class Rollout:
    """Answers of one step. Token tensors are (rows, prompt + answer), the others (rows, answer tokens)."""

    ids: Any
    mask: Any
    """1 on real tokens: prompt, and answer up to its end token."""
    answer_mask: Any
    logprobs: Any
    reference: Any
    values: Any
    scores: Any
    """(rows,): the weighted sum of the parts."""
    parts: Mapping[str, Sequence[float]]
    """What each grader said."""
    ended: Any
    """(rows,) bool: whether an end token came in time."""

    @property
    def tokens(self) -> int:
        """Longest answer that was possible."""
        return int(self.answer_mask.shape[1])


def roll_out(
    actor: ActorCritic,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    judge: Judge,
    *,
    response_length: int,
    stops: set[int],
    micro_batch: int,
    tick: Callable[[], None],
    weights: Sequence[float] | None = None,
) -> Rollout:
    """One answer to each prompt, with everything that the update needs, computed without gradients.

    Prompts are padded on the left. What is drawn depends on torch's generator alone.
    """
    import torch

    pad = tokenizer.pad_token_id
    asked, real = left_padded([prompt.ids for prompt in prompts], pad, actor.model.device)
    chunks = range(0, len(prompts), micro_batch)
    with torch.no_grad():
        parts = []
        for start in chunks:
            rows = slice(start, start + micro_batch)
            with actor.acting_as("policy") as model:
                parts.append(
                    generate(
                        model,
                        asked[rows],
                        real[rows],
                        tokens=response_length,
                        stops=stops,
                        pad=pad,
                        temperature=actor.temperature,
                    )
                )
            tick()
        answers = torch.cat(parts)
        inside = answer_mask(answers, stops)
        answers = torch.where(inside.bool(), answers, torch.full_like(answers, pad))
        ids, mask = torch.cat([asked, answers], dim=1), torch.cat([real, inside.long()], dim=1)
        policy, reference, values = [], [], []
        for start in chunks:
            rows = slice(start, start + micro_batch)
            policy.append(actor.judge("policy", ids[rows], mask[rows], response_length).logprobs)
            reference.append(actor.judge("reference", ids[rows], mask[rows], response_length).logprobs)
            with actor.acting_as("value"):
                values.append(actor.values(ids[rows], mask[rows], response_length))
            tick()
    texts = [
        tokenizer.decode(row[kept.bool()], skip_special_tokens=True) for row, kept in zip(answers, inside, strict=True)
    ]
    found = judge([prompt.answered(text) for prompt, text in zip(prompts, texts, strict=True)])
    scores = torch.tensor(total(found, weights), device=asked.device)
    ended = sum((answers == stop) & inside.bool() for stop in stops).bool().any(dim=1)
    return Rollout(ids, mask, inside, torch.cat(policy), torch.cat(reference), torch.cat(values), scores, found, ended)


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Any, Any]:
    """Prompts of any lengths as ids and mask, ending together."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def generate(model: Any, ids: Any, mask: Any, *, tokens: int, stops: set[int], pad: int, temperature: float) -> Any:
    """Sampled answers (rows, ``tokens``), filled up with padding."""
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=sorted(stops),
        pad_token_id=pad,
    )
    with drawing_plainly(model):
        whole = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    answer = whole[:, ids.shape[1] :]
    return torch.nn.functional.pad(answer, (0, tokens - answer.shape[1]), value=pad)


@contextlib.contextmanager
def drawing_plainly(model: Any) -> Iterator[None]:
    """Without what the model's own generation_config adds to whatever is not set, e.g. a repetition penalty.

    Answers must be drawn from the probabilities that the update reckons with.
    """
    from transformers import GenerationConfig

    models = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]
    kept = [one.generation_config for one in models]
    for one in models:
        one.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for one, config in zip(models, kept, strict=True):
            one.generation_config = config


def reward_measure(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    judge: Judge,
    spec: TrainSpec,
    ctx: RunContext,
    *,
    tokens: int,
    temperature: float,
    stops: set[int],
    weights: Sequence[float] | None,
) -> Callable[[], dict[str, list[float]]]:
    """For the learning check: the reward of one answer to each held-out prompt, drawn with the same random numbers."""
    rows = held_rows([len(prompt.ids) + tokens for prompt in prompts], spec.training.seed)
    chosen = [prompts[row] for row in rows]
    batch_size = spec.training.per_device_eval_batch_size

    def measure() -> dict[str, list[float]]:
        import torch

        torch.manual_seed(spec.training.seed)  # the check puts the generator back
        texts: list[str] = []
        for start in range(0, len(chosen), batch_size):
            asked = [prompt.ids for prompt in chosen[start : start + batch_size]]
            ids, mask = left_padded(asked, tokenizer.pad_token_id, model.device)
            pad = tokenizer.pad_token_id
            answers = generate(model, ids, mask, tokens=tokens, stops=stops, pad=pad, temperature=temperature)
            inside = answer_mask(answers, stops).bool()
            texts += [
                tokenizer.decode(row[kept], skip_special_tokens=True) for row, kept in zip(answers, inside, strict=True)
            ]
            ctx.tick()
        found = judge([prompt.answered(text) for prompt, text in zip(chosen, texts, strict=True)])
        return {"reward": total(found, weights)}

    return measure
