"""Rollouts: the policy answers prompts, and what each token of the answers earned is worked out once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.catalog import RunContext
from app.errors import Code, RunError
from app.files.rows import Format, read_prompts
from app.files.turns import Message, RowError
from workers.loading.actor_critic import ActorCritic
from workers.loading.ppo_math import answer_mask
from workers.loading.reward_model import Scorer, render, scores

Judge = Callable[[Sequence[list[Message]], Sequence[str]], list[float]]
"""Scores of answers: the prompts' turns and the answers' texts in, one number each out."""


@dataclass(frozen=True)
class Prompt:
    """What is asked: the turns, and their tokens with the opening of an answer."""

    turns: list[Message]
    ids: list[int]


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
    """(rows,)"""
    ended: Any
    """(rows,) bool: whether an end token came in time."""

    @property
    def tokens(self) -> int:
        """Longest answer that was possible."""
        return int(self.answer_mask.shape[1])


def load_prompts(
    path: Path, format: Any, tokenizer: Any, *, max_tokens: int, ctx: RunContext, field: str = "dataset.file"
) -> list[Prompt]:
    """Every row's prompt, rendered. Those longer than ``max_tokens`` are left out and counted. Raises RunError."""
    shape: Format = format
    prompts: list[Prompt] = []
    dropped = number = 0
    try:
        for number, turns in enumerate(read_prompts(path, shape), 1):  # noqa: B007 - read in the handler
            ids = _opened(turns, tokenizer)
            if len(ids) > max_tokens:
                dropped += 1
            else:
                prompts.append(Prompt(turns, ids))
    except RowError as error:
        raise RunError(Code.BAD_DATA, str(error), param=field) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise RunError(Code.BAD_DATA, f"row {number}: the chat template refuses it: {error}", param=field) from error
    if not prompts:
        raise RunError(
            Code.BAD_DATA,
            f"no prompt is left: all {dropped} are longer than {max_tokens} tokens",
            hint="raise training.max_length, or lower ppo.response_length",
            param=field,
        )
    if dropped:
        message = f"{dropped} prompts are longer than {max_tokens} tokens and were left out"
        ctx.event("rows_dropped", message, level="warn", dropped=dropped, max_length=max_tokens)
    ctx.event("dataset_loaded", f"{field}: {len(prompts)} prompts", rows=len(prompts))
    return prompts


def _opened(turns: list[Message], tokenizer: Any) -> list[int]:
    if tokenizer.chat_template:
        plain = [{key: value for key, value in turn.items() if key != "weight"} for turn in turns]
        text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    return list(tokenizer("\n".join(turn["content"] for turn in turns)).input_ids)


def scoring(judge: Scorer, batch_size: int) -> Judge:
    """A reward model as a judge: each conversation is rendered anew with the reward model's own template."""
    import torch

    def run(prompts: Sequence[list[Message]], answers: Sequence[str]) -> list[float]:
        found: list[float] = []
        device = next(judge.model.parameters()).device
        for start in range(0, len(answers), batch_size):
            pairs = zip(prompts[start : start + batch_size], answers[start : start + batch_size], strict=True)
            rows = [render([*turns, {"role": "assistant", "content": text}], judge.tokenizer) for turns, text in pairs]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [judge.tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            with torch.no_grad():
                found += scores(judge.model, ids.to(device), mask.to(device)).tolist()
        return found

    return run


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
) -> Rollout:
    """One answer to each prompt, with everything that the update needs, computed without gradients.

    Prompts are padded on the left. What is drawn depends on torch's generator alone.
    """
    import torch

    pad, device = tokenizer.pad_token_id, actor.model.device
    longest = max(len(prompt.ids) for prompt in prompts)
    asked = torch.tensor([[pad] * (longest - len(prompt.ids)) + prompt.ids for prompt in prompts], device=device)
    real = torch.tensor(
        [[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts], device=device
    )
    chunks = range(0, len(prompts), micro_batch)
    with torch.no_grad():
        parts = []
        for start in chunks:
            rows = slice(start, start + micro_batch)
            parts.append(_generate(actor, asked[rows], real[rows], response_length, stops, pad))
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
    judged = torch.tensor(judge([prompt.turns for prompt in prompts], texts), device=device)
    ended = sum((answers == stop) & inside.bool() for stop in stops).bool().any(dim=1)
    return Rollout(ids, mask, inside, torch.cat(policy), torch.cat(reference), torch.cat(values), judged, ended)


def _generate(actor: ActorCritic, ids: Any, mask: Any, tokens: int, stops: set[int], pad: int) -> Any:
    """Sampled answers (rows, ``tokens``), filled up with padding."""
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=True,
        temperature=actor.temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=sorted(stops),
        pad_token_id=pad,
    )
    with actor.acting_as("policy") as model:
        whole = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    answer = whole[:, ids.shape[1] :]
    return torch.nn.functional.pad(answer, (0, tokens - answer.shape[1]), value=pad)
