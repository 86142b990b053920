"""How alike two texts are, from 0 to 1.

The formulas, with the words of a text in lower case and without punctuation (a Chinese, Japanese or Korean sign is a
word of its own):

* ``fuzzy_match``: 2 · LCS / (|a| + |b|) over characters, the normalised indel similarity;
* ``bleu``: brevity penalty · geometric mean of the clipped n-gram precisions, n up to 4 and to the words there are
  (Papineni et al. 2002), with one added to both counts from n = 2 (Lin & Och 2004), so that one miss is not 0;
* ``gleu``: matching n-grams, n = 1…4 / the larger number of n-grams (Wu et al. 2016, arXiv 1609.08144);
* ``rouge_1`` … ``rouge_5``: F1 of matching n-grams; ``rouge_l``: F1 of the longest common subsequence (Lin 2004).
"""

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal

from app.catalog import Grader
from app.grading import GraderSpec, Sample
from workers.loading.templates import Template, fill

_EACH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_EACH}]|[^\W_{_EACH}]+")

Metric = Literal["fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"]
Words = Sequence[Hashable]


class TextSimilaritySpec(GraderSpec):
    """How alike input and reference are, from 0 to 1."""

    type: Literal["text_similarity"] = "text_similarity"
    input: Template = "{{sample.output_text}}"
    reference: Template
    evaluation_metric: Metric = "fuzzy_match"


def grade(spec: TextSimilaritySpec, samples: Sequence[Sample]) -> list[float]:
    """A pure function of both texts."""
    scores = []
    for sample in samples:
        text, reference = fill(spec.input, sample), fill(spec.reference, sample)
        scores.append(0.0 if text is None or reference is None else similarity(spec.evaluation_metric, text, reference))
    return scores


def similarity(metric: Metric, text: str, reference: str) -> float:
    """One number from 0 to 1."""
    if metric == "fuzzy_match":
        return f1(common(text, reference), len(text), len(reference)) if text or reference else 1.0
    words, wanted = (_WORD.findall(side.lower()) for side in (text, reference))
    if not words or not wanted:
        return 0.0
    if metric == "bleu":
        return bleu(words, wanted)
    if metric == "gleu":
        return gleu(words, wanted)
    if metric == "rouge_l":
        return f1(common(words, wanted), len(words), len(wanted))
    size = int(metric[-1])
    return f1(_matching(words, wanted, size), len(words) - size + 1, len(wanted) - size + 1)


def f1(matching: int, given: int, wanted: int) -> float:
    """Harmonic mean of precision and recall."""
    return 2 * matching / (given + wanted) if matching and given > 0 and wanted > 0 else 0.0


def bleu(words: Words, wanted: Words) -> float:
    """Sentence BLEU with one reference."""
    logs = 0.0
    orders = min(4, len(words))
    for size in range(1, orders + 1):
        extra = 0 if size == 1 else 1
        matching = _matching(words, wanted, size) + extra
        if not matching:
            return 0.0
        logs += math.log(matching / (len(words) - size + 1 + extra))
    brevity = min(1.0, math.exp(1 - len(wanted) / len(words)))
    return brevity * math.exp(logs / orders)


def gleu(words: Words, wanted: Words) -> float:
    """The smaller of precision and recall over all n-grams."""
    matching = sum(_matching(words, wanted, size) for size in range(1, 5))
    most = max(sum(max(len(side) - size + 1, 0) for size in range(1, 5)) for side in (words, wanted))
    return matching / most


def _matching(words: Words, wanted: Words, size: int) -> int:
    return sum((_grams(words, size) & _grams(wanted, size)).values())


def _grams(words: Words, size: int) -> "Counter[tuple[Hashable, ...]]":
    return Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def common(left: Words, right: Words) -> int:
    """Length of the longest common subsequence, all places of ``left`` at once as bits (Hyyrö 2004)."""
    places: dict[Hashable, int] = {}
    for place, sign in enumerate(left):
        places[sign] = places.get(sign, 0) | 1 << place
    whole = row = (1 << len(left)) - 1
    for sign in right:
        matched = row & places.get(sign, 0)
        row = (row + matched) | (row - matched)
        row &= whole
    return len(left) - row.bit_count()


grader = Grader(TextSimilaritySpec, grade)
