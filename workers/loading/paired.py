"""Two measurements of the same rows, before and after: the change, and how sure it is."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any, Literal

from app.specs import Better

Verdict = Literal["learnt", "no_effect", "worse", "not_measured"]
CONFIDENCE = 0.95
LEAST = 1e-3
"""Changes smaller than this are no effect, however sure they are: a thousandth of a nat, or of a reward's unit."""


@dataclass(frozen=True)
class Change:
    """Means of the base and of the tuned model, and the interval of the mean change: Student's t over the rows.

    With dᵢ = tunedᵢ − baseᵢ: d̄ ± t₀.₉₇₅,ₙ₋₁ · s_d / √n (Student 1908, "The probable error of a mean"). Rows are
    compared each with itself, so that what differs between rows does not count.
    """

    base: float
    tuned: float
    change: float
    low: float
    high: float
    better: Better

    @property
    def verdict(self) -> Verdict:
        """What can be said with 95 % confidence."""
        gain_low, gain_high = (self.low, self.high) if self.better == "higher" else (-self.high, -self.low)
        if abs(self.change) >= LEAST:
            if gain_low > 0:
                return "learnt"
            if gain_high < 0:
                return "worse"
        return "no_effect"

    def as_dict(self) -> dict[str, Any]:
        """For the job object."""
        return asdict(self)


def compare(base: Sequence[float], tuned: Sequence[float], better: Better) -> Change:
    """Row by row; at least two rows, all numbers finite."""
    differences = [after - before for before, after in zip(base, tuned, strict=True)]
    mean, rows = fmean(differences), len(differences)
    margin = t_quantile((1 + CONFIDENCE) / 2, rows - 1) * stdev(differences) / math.sqrt(rows)
    return Change(fmean(base), fmean(tuned), mean, mean - margin, mean + margin, better)


def t_quantile(probability: float, freedom: int) -> float:
    """Student's t by its expansion about the normal quantile (Abramowitz and Stegun 1964, 26.7.5)."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(freedom) ** power for power, term in enumerate(terms, 1))
