"""What an evaluation tells: of each number model, baseline and change; which questions were lost; every answer."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from app.catalog import RunContext
from workers.loading.canary import QUESTIONS
from workers.loading.paired import Change
from workers.loading.prompts import Prompt
from workers.loading.suites import Asked, changes_of

FORGOTTEN = 0.2
"""Share of the canary's questions that the base knew and the tuned model does not, above which it is a warning."""
WORDS = {"learnt": "better", "no_effect": "no_difference", "worse": "worse"}


class Answered(NamedTuple):
    """What one model said, and what graders think of it."""

    texts: list[str]
    scores: dict[str, list[float]]
    known: list[bool]
    """Whether it answered each of the canary's questions."""
    suites: Asked | None = None
    name: str | None = None
    """Under which it was served."""


def shown(change: Change, *, compared: bool) -> dict[str, Any]:
    """One row of the report; without a baseline ``low`` and ``high`` are the interval of the score itself."""
    if not compared:
        return {
            "model": change.tuned,
            "baseline": None,
            "low": change.low,
            "high": change.high,
            "verdict": "not_compared",
        }
    return {
        "model": change.tuned,
        "baseline": change.base,
        "change": change.change,
        "low": change.low,
        "high": change.high,
        "verdict": WORDS[change.verdict],
    }


def of_suites(after: Asked, before: Asked | None) -> tuple[dict[str, Any], dict[str, Change]]:
    """Rows of the report by task and metric, and of each task the change in its first metric, by which a gate goes."""
    report: dict[str, dict[str, Any]] = {}
    first: dict[str, Change] = {}
    changes = changes_of(before, after) if before is not None else {}
    for key, score in after.scores.items():
        task, metric, chosen = key
        base = before.scores.get(key) if before is not None else None
        entry: dict[str, Any] = {
            "model": score.value,
            "stderr": score.stderr,
            "baseline": base.value if base is not None else None,
            "better": score.better,
            "documents": len(score.each) or None,
            "verdict": "not_compared",
        }
        if key in changes:
            change = changes[key]
            entry |= {"change": change.change, "low": change.low, "high": change.high}
            entry["verdict"] = WORDS[change.verdict]
            first.setdefault(task, change)
        report.setdefault(task, {})[metric if chosen == "none" else f"{metric},{chosen}"] = entry
    return report, first


def of_canary(ctx: RunContext, tuned: Answered, before: Answered | None) -> dict[str, Any]:
    """How many of the general questions each answers, and which the model lost; many lost ones are a warning."""
    found: dict[str, Any] = {"questions": len(QUESTIONS), "model": sum(tuned.known)}
    if before is None:
        return found
    pairs = list(zip(QUESTIONS, before.known, tuned.known, strict=True))
    lost = [question.text for question, then, now in pairs if then and not now]
    found |= {
        "baseline": sum(before.known),
        "lost": lost,
        "gained": [question.text for question, then, now in pairs if now and not then],
    }
    if len(lost) > FORGOTTEN * len(QUESTIONS):
        message = f"{len(lost)} of {len(QUESTIONS)} general questions that the baseline answers are no longer answered"
        ctx.event("general_knowledge_lost", message, level="warn", lost=lost)
    return found


def of_rows(prompts: list[Prompt], tuned: Answered, before: Answered | None) -> Iterator[dict[str, Any]]:
    """What each prompt was answered, and the scores of that."""
    for row, prompt in enumerate(prompts):
        entry: dict[str, Any] = {"row": row + 1, "prompt": prompt.turns, "model": tuned.texts[row]}
        entry["scores"] = {name: scores[row] for name, scores in tuned.scores.items()}
        if before is not None:
            entry["baseline"] = before.texts[row]
            entry["baseline_scores"] = {name: scores[row] for name, scores in before.scores.items()}
        yield entry
