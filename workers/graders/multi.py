"""Several graders as one: a weighted sum, or a formula over their scores."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from app.catalog import Bench, Grader
from app.errors import Code, RunError
from app.grading import GraderSpec, Sample, Scoring
from app.specs import conflict
from workers.loading.formulas import FUNCTIONS, LONGEST, Formula

Key = Annotated[str, Field(pattern=r"^[A-Za-z_]\w{0,62}$")]


class MultiSpec(GraderSpec):
    """One score out of several graders."""

    type: Literal["multi"] = "multi"
    graders: dict[Key, GraderSpec] = Field(
        min_length=1, max_length=16, description="Graders by the names that weights or calculate_output give them."
    )
    weights: dict[str, float] | None = Field(
        None, description="What each score is multiplied by before they are added; default 1 / their number."
    )
    calculate_output: str | None = Field(
        None,
        min_length=1,
        max_length=LONGEST,
        description=f"A formula instead of weights: names of graders, numbers, + - * / ^, {', '.join(FUNCTIONS)}.",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        known = ", ".join(self.graders)
        if self.weights is not None and self.calculate_output is not None:
            raise conflict("weights", "weights and calculate_output exclude each other", "Keep one of the two.")
        if self.weights is not None and self.weights.keys() != self.graders.keys():
            raise conflict("weights", "weights names other graders than graders", f"Give each of {known} a number.")
        if self.calculate_output is not None:
            try:
                names = Formula(self.calculate_output).names
            except ValueError as error:
                raise conflict(
                    "calculate_output", f"calculate_output is no formula: {error}", f"For example: {_sum(self)}."
                ) from None
            if names != self.graders.keys():
                odd = sorted(names ^ self.graders.keys())[0]
                what = "does not use" if odd in self.graders else "names"
                raise conflict(
                    "calculate_output", f"calculate_output {what} {odd}", f"Use each of the graders: {known}."
                )
        return self


def _sum(spec: MultiSpec) -> str:
    return " + ".join(f"{1 / len(spec.graders):.2g} * {name}" for name in spec.graders)


def load(spec: MultiSpec, bench: Bench) -> Scoring:
    """Makes its parts ready, then adds up."""
    parts = {name: bench.scoring(part, f"graders.{name}") for name, part in spec.graders.items()}
    formula = Formula(spec.calculate_output) if spec.calculate_output is not None else None
    weights = spec.weights or dict.fromkeys(spec.graders, 1 / len(spec.graders))

    def score(samples: Sequence[Sample]) -> list[float]:
        columns = {name: part(samples) for name, part in parts.items()}
        rows = [{name: column[place] for name, column in columns.items()} for place in range(len(samples))]
        if formula is None:
            return [sum(weights[name] * value for name, value in row.items()) for row in rows]
        return [_calculated(formula, spec, row) for row in rows]

    return score


def _calculated(formula: Formula, spec: MultiSpec, row: dict[str, float]) -> float:
    try:
        return formula(row)
    except (ArithmeticError, ValueError) as error:
        scores = ", ".join(f"{name} = {value:g}" for name, value in row.items())
        raise RunError(
            Code.BAD_SPEC,
            f"calculate_output of the grader {spec.label} has no value for {scores}: {error}",
            hint="Keep what divides and the inside of log and sqrt above 0, e.g. with max(…, 0.01).",
        ) from error


grader = Grader(MultiSpec, load=load)
