"""trl's GRPO trainer, made exact to resume and judged by graders."""

import contextlib
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from app.catalog import RunContext
from app.grading import Sample, Scoring
from workers.loading.actor_critic import positions
from workers.loading.rollouts import drawing_plainly
from workers.loading.row_losses import takes_positions
from workers.loading.signs import Signs
from workers.loading.trainer import watched
from workers.loading.watch import Watch

ROLLOUT = "rollout_{rank}.pt"
"""Answers that were drawn and not used up when a checkpoint was written, one file a rank."""


CLIPPED = "completions/clipped_ratio"


class GroupOrder:
    """A sampler: ``chunk`` prompts at a time, each ``group`` times in a row, and each chunk ``repeat`` times.

    The order depends on seed and epoch alone. Every prompt is asked in every epoch; the last chunk is filled up with
    the epoch's first prompts.
    """

    def __init__(self, rows: int, *, group: int, chunk: int, repeat: int, seed: int) -> None:
        self._rows, self._group, self._chunk, self._repeat, self._seed = rows, group, chunk, repeat, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each pass."""
        self._epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self._rows / self._chunk) * self._chunk * self._group * self._repeat

    def __iter__(self) -> Iterator[int]:
        order = list(range(self._rows))
        random.Random(f"{self._seed}/{self._epoch}").shuffle(order)
        for start in range(0, self._rows, self._chunk):
            chunk = [order[place % self._rows] for place in range(start, start + self._chunk)]
            for _ in range(self._repeat):
                yield from (row for row in chunk for _ in range(self._group))


def reward_function(label: str, score: Scoring) -> Callable[..., list[float]]:
    """A grader as trl calls it, on rows of ``prompts_file``."""

    def reward(completions: Sequence[str], row: Sequence[str], **_: Any) -> list[float]:
        known = [json.loads(text) for text in row]
        return score([Sample(text, one["item"], one["turns"]) for text, one in zip(completions, known, strict=True)])

    reward.__name__ = label
    return reward


def grouped(trainer: Any, watch: Watch, ctx: RunContext) -> Any:
    """A subclass of ``GRPOTrainer`` for rows of ``prompts_file``. Prompts are token ids, answers are texts.

    What a step draws depends on the seed and its number alone. Log-probabilities are worked out with the positions that
    generation uses, and on a CPU for the answers' tokens alone, which trl does for all.
    """
    import torch

    class Grouped(watched(trainer, watch, lean_loss=False)):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if "ref" in getattr(self.model, "peft_config", {}):
                # A fresh adapter changes nothing, so the model without it is the reference as well.
                self.model.delete_adapter("ref")
            self._lean = self.args.device.type == "cpu" and takes_positions(self.model) and not self.aux_loss_enabled
            self._begun = False
            self._signs: Signs | None = None

        def _get_train_sampler(self, dataset: Any = None) -> GroupOrder:
            return GroupOrder(
                len(dataset if dataset is not None else self.train_dataset),
                group=self.num_generations,
                chunk=self.args.generation_batch_size // self.num_generations,
                repeat=self.num_iterations * self.args.steps_per_generation,
                seed=self.args.seed,
            )

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            if not self._begun:
                self._begun = True
                self._step = self.state.global_step * self.args.gradient_accumulation_steps
                self._take_up()
            rank, ranks = self.args.process_index, self.args.world_size
            torch.manual_seed((self.args.seed * 1_000_003 + self._step) * ranks + rank)
            return super().training_step(model, inputs, num_items_in_batch)

        def _take_up(self) -> None:
            """The answers that the interrupted attempt had not used up."""
            resume: Path | None = getattr(ctx, "resume_from", None)
            file = resume / ROLLOUT.format(rank=self.args.process_index) if resume else None
            if file is not None and file.is_file():
                self._buffered_inputs = torch.load(file, weights_only=True, map_location=self.args.device)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            if self._step % (self.args.steps_per_generation * self.num_iterations):
                folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
                torch.save(self._buffered_inputs, folder / ROLLOUT.format(rank=self.args.process_index))

        def _tokenize_prompts(self, prompts: Any) -> Any:
            return prompts, None, {}

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            ctx.tick()
            with drawing_plainly(self.accelerator.unwrap_model(self.model)):
                answers, logprobs = super()._generate_single_turn(*args, **kwargs)
            if self.model.training:
                watch.step_tokens += sum(map(len, answers))
            ctx.tick()
            return answers, logprobs

        def _get_per_token_logps_and_entropies(
            self,
            model: Any,
            input_ids: Any,
            attention_mask: Any,
            logits_to_keep: int,
            batch_size: int | None = None,
            compute_entropy: bool = False,
            **more: Any,
        ) -> Any:
            if not self._lean:
                return super()._get_per_token_logps_and_entropies(
                    lambda **inputs: model(**inputs, position_ids=positions(inputs["attention_mask"])),
                    input_ids,
                    attention_mask,
                    logits_to_keep,
                    batch_size=batch_size,
                    compute_entropy=compute_entropy,
                    **more,
                )
            parts = [
                self._answers_of(model, ids, mask, logits_to_keep, compute_entropy)
                for ids, mask in zip(
                    input_ids.split(batch_size or len(input_ids)),
                    attention_mask.split(batch_size or len(input_ids)),
                    strict=True,
                )
            ]
            logprobs, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
            return logprobs, entropies if compute_entropy else None, None

        def _answers_of(self, model: Any, ids: Any, mask: Any, answer: int, entropy: bool) -> Any:
            """Log-probability and entropy of the last ``answer`` tokens of each row; 0 on padding."""
            with self.accelerator.autocast():
                logits = model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions(mask),
                    use_cache=False,
                    logits_to_keep=answer + 1,
                ).logits[:, :-1]
            every = torch.log_softmax(logits.float() / self.temperature, dim=-1)
            real = mask[:, -answer:]
            chosen = every.gather(-1, ids[:, -answer:].unsqueeze(-1)).squeeze(-1) * real
            if not entropy:
                return chosen, torch.zeros_like(chosen)
            with contextlib.nullcontext() if self._entropy_bonus_enabled else torch.no_grad():
                return chosen, -(every.exp() * every).sum(-1) * real

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log(logs, start_time)
            known = [entry for entry in self.state.log_history if CLIPPED in entry]
            if CLIPPED not in logs or watch.health is None:
                return
            if self._signs is None:
                self._signs = Signs(watch.health, "grpo.max_completion_length")
                self._signs.began(known[0][CLIPPED])
            kl = logs["kl"] * logs["completions/mean_length"] if logs.get("kl") is not None else None
            self._signs.step(self.state.global_step, kl, logs[CLIPPED])

    return Grouped
