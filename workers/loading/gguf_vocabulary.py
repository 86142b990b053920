"""A tokenizer as GGUF has it: entries with their types, merges or scores, and what stands before and behind a text."""

import json
import re
from dataclasses import dataclass
from typing import Any

from app import gguf as rules
from app.errors import Code, RunError

# As the format numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_BYTE = re.compile(r"^<0x[0-9A-F]{2}>$")


@dataclass(frozen=True)
class Vocabulary:
    """What is written of a tokenizer."""

    reader: str
    """The name by which readers cut text; ``llama`` for sentencepiece's."""
    tokens: list[str]
    """One for each row of the embeddings; rows that the tokenizer has no entry for are named by their number."""
    types: list[int]
    merges: list[str]
    scores: list[float]
    """For sentencepiece's instead of merges: the higher, the earlier two pieces become this one."""
    special: dict[str, int]
    """Ids by role: bos, eos, unk, pad."""
    adds_bos: bool
    adds_eos: bool
    space_first: bool
    template: str | None

    @property
    def sentencepiece(self) -> bool:
        """Whether pieces are joined by scores."""
        return self.reader == rules.SENTENCEPIECE


def read_vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """From a tokenizer as transformers loads it; ``rows``: how many embeddings the model has.

    Raises RunError model_invalid for a tokenizer that the format has no place for.
    """
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    if fault := rules.tokenizer_misfit(document):
        raise RunError(Code.MODEL_INVALID, fault.message, hint=fault.hint, param="model")
    reader = rules.reader_of(document)
    assert reader is not None
    added = {entry["id"]: entry for entry in document["added_tokens"]}
    known = {index: token for token, index in document["model"]["vocab"].items()}
    known |= {index: entry["content"] for index, entry in added.items()}
    if max(known) >= rows:
        raise RunError(
            Code.MODEL_INVALID,
            f"the tokenizer knows ids up to {max(known)}, the model has {rows} embeddings",
            hint="use the tokenizer that the model was trained with",
            param="model",
        )
    unknown = document["model"].get("unk_token")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in document["model"]["merges"]]
    pieces = reader == rules.SENTENCEPIECE
    return Vocabulary(
        reader=reader,
        tokens=[known.get(index, f"[PAD{index}]") for index in range(rows)],
        types=[_type(known.get(index), added.get(index), unknown, pieces) for index in range(rows)],
        merges=[] if pieces else [" ".join(pair) for pair in pairs],
        scores=_scores(pairs, known, rows) if pieces else [],
        special=_special(tokenizer),
        **_around(tokenizer),
        space_first=pieces and rules.puts_space_first(document),
        template=_template(tokenizer),
    )


def _type(token: str | None, added: dict[str, Any] | None, unknown: str | None, pieces: bool) -> int:
    if token is None:
        return UNUSED
    if pieces and token == unknown:
        return UNKNOWN
    if pieces and _BYTE.match(token):
        return BYTE
    if added is None:
        return NORMAL
    return CONTROL if added["special"] else USER_DEFINED


def _scores(pairs: list[list[str]], known: dict[int, str], rows: int) -> list[float]:
    """Earlier merges score higher; what no merge makes is never joined, so that its score says nothing."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(known.get(index, ""), 0)) for index in range(rows)]


def _special(tokenizer: Any) -> dict[str, int]:
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")}
    if ids["pad"] == ids["eos"]:
        del ids["pad"]  # a stand-in
    return {role: int(index) for role, index in ids.items() if index is not None}


def _around(tokenizer: Any) -> dict[str, bool]:
    """What the tokenizer puts around a text, asked of itself: post-processors say it in many ways."""
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    return {
        "adds_bos": len(whole) > len(bare) and whole[0] == tokenizer.bos_token_id,
        "adds_eos": len(whole) > len(bare) and whole[-1] == tokenizer.eos_token_id,
    }


def _template(tokenizer: Any) -> str | None:
    """The chat template; of several the one named default."""
    template = tokenizer.chat_template
    found = template.get("default") if isinstance(template, dict) else template
    return found if isinstance(found, str) else None
