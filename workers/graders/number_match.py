"""Whether an answer gives the right number, as in GSM8K, whose answers end with ``#### 42``."""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal

from pydantic import Field

from app.catalog import Grader
from app.errors import Code, RunError
from app.grading import GraderSpec, Sample
from workers.loading.templates import Template, fill

# A sign counts where it cannot be a minus between two numbers; commas count between groups of three digits.
_NUMBER = re.compile(
    r"(?:(?<![\w)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,2}(?!\d))?"
)


class NumberMatchSpec(GraderSpec):
    """1 when the number in the answer is that of the reference, else 0.

    The number of a text is the first behind the marker's last occurrence; without a marker in it, its last number.
    """

    type: Literal["number_match"] = "number_match"
    input: Template = "{{sample.output_text}}"
    reference: Template = "{{item.answer}}"
    marker: str | None = Field(
        "####", min_length=1, max_length=64, description="Stands before the number; null = none."
    )
    need_marker: bool = Field(False, description="An answer without the marker is wrong, whatever it says.")
    tolerance: float = Field(0.0, ge=0, description="Largest difference that still counts as the same number.")


def grade(spec: NumberMatchSpec, samples: Sequence[Sample]) -> list[float]:
    """Raises RunError bad_data for a reference without a number: nothing could match it."""
    return [float(_matches(spec, sample)) for sample in samples]


def _matches(spec: NumberMatchSpec, sample: Sample) -> bool:
    text, reference = fill(spec.input, sample), fill(spec.reference, sample)
    if reference is None:
        return False
    wanted = number(reference, spec.marker)
    if wanted is None:
        raise RunError(Code.BAD_DATA, f"{spec.label}: there is no number in the reference {reference[-80:]!r}")
    if text is None or (spec.need_marker and spec.marker and spec.marker not in text):
        return False
    given = number(text, spec.marker)
    return given is not None and abs(given - wanted) <= Decimal(str(spec.tolerance))


def number(text: str, marker: str | None) -> Decimal | None:
    """The number that a text gives; None when it gives none."""
    before, found, behind = text.rpartition(marker) if marker else ("", "", "")
    if found:
        first = _NUMBER.search(behind)
        return _decimal(first[0]) if first else None
    numbers = _NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


grader = Grader(NumberMatchSpec, grade)
