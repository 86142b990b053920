"""Rows that compare two answers, and rows that only ask: for reward models, DPO, PPO and GRPO (stdlib only)."""

from collections.abc import Mapping
from typing import Any

from app.files.json_rows import kind
from app.files.turns import Message, RowError, field_of, items, message, sharegpt_turn

# The better answer, the worse one.
PREFERENCE_FIELDS = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))


def from_preference(row: Mapping[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt, chosen and rejected turns. Raises RowError.

    Answers are texts, one turn, or lists of turns; the prompt stands in prompt, messages, conversations or (OpenAI's
    shape) input.messages, or is what both answers begin with.
    """
    found = [pair for pair in PREFERENCE_FIELDS if pair[0] in row and pair[1] in row]
    if not found:
        raise RowError("chosen", "is missing: each row needs a chosen and a rejected answer")
    good, bad = found[0]
    prompt = _prompt(row)
    chosen, rejected = _answer(row, good), _answer(row, bad)
    if not prompt:
        while chosen and rejected and chosen[0] == rejected[0]:
            prompt.append(chosen.pop(0))
            rejected.pop(0)
    for name, turns in ((good, chosen), (bad, rejected)):
        if not turns or turns[-1]["role"] != "assistant":
            raise RowError(name, "must end with an assistant turn")
    if not prompt:
        raise RowError("prompt", "is missing: nothing comes before the two answers")
    if prompt[-1]["role"] == "assistant":
        raise RowError("prompt", "ends with an assistant turn; the answers belong into " + f"{good} and {bad}")
    if chosen == rejected:
        raise RowError(bad, f"is the same as {good}, so there is nothing to learn")
    return prompt, chosen, rejected


def from_prompt(row: Mapping[str, Any]) -> list[Message]:
    """The turns of a row that only asks. Raises RowError."""
    if row.get("prompt") is None:
        raise RowError("prompt", "is missing")
    turns = _turns(row["prompt"], "prompt", "user")
    if not turns or turns[-1]["role"] == "assistant":
        raise RowError("prompt", "must end with somebody else's turn; the model answers it")
    return turns


def _prompt(row: Mapping[str, Any]) -> list[Message]:
    turns: list[Message] = []
    if row.get("system"):
        turns.append({"role": "system", "content": field_of(row, "system")})
    if row.get("prompt") is not None:
        turns += _turns(row["prompt"], "prompt", "user")
    elif "messages" in row:
        turns += _turns(items(row, "messages"), "messages", "user")
    elif "conversations" in row:
        turns += _turns(items(row, "conversations"), "conversations", "user")
    elif "input" in row and isinstance(row["input"], dict):
        turns += _turns(items(row["input"], "messages"), "input.messages", "user")
    elif row.get("instruction") is not None:
        turns.append({"role": "user", "content": field_of(row, "instruction", needed=True)})
    return turns


def _answer(row: Mapping[str, Any], name: str) -> list[Message]:
    if row[name] is None:
        raise RowError(name, "is missing")
    return _turns(row[name], name, "assistant")


def _turns(value: Any, where: str, speaker: str) -> list[Message]:
    """A text is one turn of the speaker; an object one turn; a list several."""
    if isinstance(value, str):
        return [message({"role": speaker, "content": value}, where)]
    if isinstance(value, dict):
        return [_turn(value, where)]
    if isinstance(value, list):
        return [_turn(turn, f"{where}[{index}]") for index, turn in enumerate(value)]
    raise RowError(where, f"must be a text, a message or a list of messages, not {kind(value)}")


def _turn(value: Any, where: str) -> Message:
    return sharegpt_turn(value, where) if isinstance(value, dict) and "from" in value else message(value, where)
