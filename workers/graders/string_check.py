"""Whether a text is, is not, or holds another."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from app.catalog import Grader
from app.grading import GraderSpec, Sample
from workers.loading.templates import Template, fill


class StringCheckSpec(GraderSpec):
    """1 when the comparison holds, else 0."""

    type: Literal["string_check"] = "string_check"
    input: Template = "{{sample.output_text}}"
    reference: Template
    operation: Literal["eq", "ne", "like", "ilike"] = Field(
        "eq", description="Equal; not equal; the input holds the reference; the same without regard to case."
    )


def grade(spec: StringCheckSpec, samples: Sequence[Sample]) -> list[float]:
    """To the letter: spaces and line ends count."""
    return [float(_holds(spec, fill(spec.input, one), fill(spec.reference, one))) for one in samples]


def _holds(spec: StringCheckSpec, text: str | None, reference: str | None) -> bool:
    if text is None or reference is None:
        return False
    match spec.operation:
        case "eq":
            return text == reference
        case "ne":
            return text != reference
        case "like":
            return reference in text
        case "ilike":
            return reference.casefold() in text.casefold()


grader = Grader(StringCheckSpec, grade)
