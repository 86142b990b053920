"""Whether a pattern is found in a text."""

import re
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from app.catalog import Grader
from app.grading import GraderSpec, Sample
from app.specs import conflict
from workers.loading.patterns import fault_of, found
from workers.loading.templates import Template, fill


class RegexSpec(GraderSpec):
    r"""1 when the pattern is found, else 0: ``#### *-?\d+`` asks for a number behind four signs."""

    type: Literal["regex"] = "regex"
    input: Template = "{{sample.output_text}}"
    pattern: Template = Field(
        min_length=1,
        max_length=2000,
        description="A regular expression as Python writes it; what {{item.…}} fills in stands for itself.",
    )
    full: bool = Field(False, description="The pattern must match the whole text.")
    ignore_case: bool = Field(False, description="Capitals do not count.")

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        fault = fault_of(fill(self.pattern, Sample("x", _AnyRow()), re.escape) or "")
        if fault:
            raise conflict(
                "pattern", f"pattern is no regular expression: {fault}", r"A sign as such is written \. or \(."
            )
        return self


class _AnyRow(dict[str, object]):
    """Has something in every column."""

    def get(self, key: str, default: object = None) -> object:
        return _AnyRow()


def grade(spec: RegexSpec, samples: Sequence[Sample]) -> list[float]:
    """Raises RunError bad_spec for a pattern that does not come to an end."""
    return [float(_found(spec, fill(spec.input, one), fill(spec.pattern, one, re.escape))) for one in samples]


def _found(spec: RegexSpec, text: str | None, pattern: str | None) -> bool:
    if text is None or pattern is None:
        return False
    return found(pattern, text, full=spec.full, ignore_case=spec.ignore_case)


grader = Grader(RegexSpec, grade)
