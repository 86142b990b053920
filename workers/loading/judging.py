"""Judges: what says how good answers are, made from a spec's graders or from a reward model alone."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from app.artifacts.references import references
from app.catalog import Catalog, RunContext
from app.errors import Code, RunError
from app.grading import GraderSpec, Sample, Scoring
from app.specs import Dtype
from workers.loading.chain import fold
from workers.loading.conversations import load_tokenizer
from workers.loading.devices import Compute
from workers.loading.reward_model import load_scorer, render, row_rewards
from workers.loading.templates import item_paths, lacks

Judge = Callable[[Sequence[Sample]], dict[str, list[float]]]
"""Scores of answers by the name of what gave them; one number for each answer."""


@dataclass
class Bench:
    """What graders are made ready with (``app.catalog.Bench``)."""

    ctx: RunContext
    field: str
    device: str
    dtype: Dtype
    batch_size: int

    def scoring(self, spec: GraderSpec, place: str) -> Scoring:
        """A grader that stands at ``place`` within this field; it answers with finite numbers or a RunError."""
        plug = self.ctx.catalog.graders[spec.type]
        if plug.grade is not None:
            grade = plug.grade
            return _checked(spec.label, lambda samples: grade(spec, samples))
        assert plug.load is not None
        inner = Bench(self.ctx, f"{self.field}.{place}", self.device, self.dtype, self.batch_size)
        return _checked(spec.label, plug.load(spec, inner))


def load_graders(
    graders: Sequence[GraderSpec], ctx: RunContext, compute: Compute, batch_size: int, field: str = "graders"
) -> dict[str, Scoring]:
    """The graders of a list, ready, by their names. Raises RunError."""
    bench = Bench(ctx, field, compute.device, compute.dtype, batch_size)
    return {grader.label: bench.scoring(grader, str(index)) for index, grader in enumerate(graders)}


def judge_of(graders: Mapping[str, Scoring]) -> Judge:
    """Graders as one judge."""
    return lambda samples: {label: score(samples) for label, score in graders.items()}


def total(scores: Mapping[str, Sequence[float]], weights: Sequence[float] | None = None) -> list[float]:
    """The sum of all scores of each answer, in the order of the graders; without weights each counts as it is."""
    columns = list(scores.values())
    factors = weights or [1.0] * len(columns)
    return [
        sum(factor * value for factor, value in zip(factors, row, strict=True)) for row in zip(*columns, strict=True)
    ]


def reward_scoring(ctx: RunContext, field: str, compute: Compute, batch_size: int) -> Scoring:
    """The reward model behind a field: each conversation is rendered anew with its own template. Raises RunError."""
    folder = ctx.input(field)
    scorer = load_scorer(folder, _base_of(ctx, field), compute, load_tokenizer(folder))

    def score(samples: Sequence[Sample]) -> list[float]:
        import torch

        rows = [
            render([*one.turns, {"role": "assistant", "content": one.output_text}], scorer.tokenizer) for one in samples
        ]
        with torch.no_grad():
            return row_rewards(scorer.model, rows, compute=compute, batch_size=batch_size, ctx=ctx)

    return score


def _base_of(ctx: RunContext, field: str) -> Path | None:
    """What a reward model's adapter was trained on; None for one that is whole."""
    if not ctx.input_info(f"{field}.base"):
        return None
    root = ctx.input(f"{field}.base")
    layers = [Path(layer) for layer in ctx.input_info(field).get("under", ())]
    if not layers:
        return root
    folder = ctx.work_dir / f"judge-{field}"
    fold(root, layers, root.name, folder)
    return folder


def _checked(label: str, score: Scoring) -> Scoring:
    def run(samples: Sequence[Sample]) -> list[float]:
        scores = score(samples)
        if len(scores) != len(samples):
            raise RunError(Code.RUN_FAILED, f"the grader {label} gave {len(scores)} scores for {len(samples)} answers")
        if bad := [value for value in scores if not math.isfinite(value)]:
            raise RunError(Code.NON_FINITE_LOSS, f"the grader {label} scored an answer with {bad[0]}")
        return scores

    return run


def check_row(graders: Sequence[GraderSpec], catalog: Catalog, sample: Sample) -> str | None:
    """Why some grader could not judge answers to this row; None for a good one.

    Columns that templates read must be there, and what needs no model is tried on an empty answer.
    """
    for index, grader in enumerate(graders):
        for where, steps in item_paths(grader, f"graders.{index}"):
            if lacks(sample.item, steps):
                return f"item.{'.'.join(steps)} is missing; {where} reads it"
        for spec in _all_of(grader):
            grade = catalog.graders[spec.type].grade
            try:
                if grade is not None:
                    grade(spec, [sample])
            except RunError as error:
                return error.message
    return None


def reads_models(graders: Sequence[GraderSpec]) -> bool:
    """Whether any of them, or what it is made of, has a model loaded."""
    return any(kind != "file" for grader in graders for _, kind, _ in references(grader))


def _all_of(spec: BaseModel) -> Iterator[GraderSpec]:
    """A grader and those that it is made of."""
    if isinstance(spec, GraderSpec):
        yield spec
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for part in parts:
            if isinstance(part, BaseModel):
                yield from _all_of(part)
