"""One turn of a conversation, read strictly: every fault names its field (stdlib only)."""

from collections.abc import Mapping
from typing import Any

from app.files.json_rows import Unit, kind, quote

Message = dict[str, Any]
"""``role`` (system, user, assistant, tool), ``content``, and where given ``weight``, ``tool_calls``, ``name``."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
}


class RowError(ValueError):
    """A row that cannot be learnt from; ``line`` is 0 while the place is not known yet."""

    def __init__(self, field: str, message: str, line: int = 0, unit: Unit = "line") -> None:
        super().__init__(f"{unit} {line}: {field + ': ' if field else ''}{message}")
        self.field = field
        self.message = message
        self.line = line


def message(turn: Any, where: str) -> Message:
    """``{"role": …, "content": …}`` as a message. Raises RowError."""
    if not isinstance(turn, dict):
        raise RowError(where, f"must be an object with role and content, not {kind(turn)}")
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        what = "role is missing" if role is None else f"unknown role {quote(role)}"
        raise RowError(f"{where}.role", f"{what}; known are {known}")
    made: Message = {"role": ROLES[role]}
    calls = turn.get("tool_calls")
    if calls is not None and (not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls)):
        raise RowError(f"{where}.tool_calls", "must be a list of objects")
    content = turn.get("content")
    if isinstance(content, list):
        content = _join_parts(content, f"{where}.content")
    if content is None and calls:
        content = ""
    if content is None:
        raise RowError(f"{where}.content", "content is missing")
    made["content"] = text(content, f"{where}.content", needed=role == "assistant" and not calls)
    if calls:
        made["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if turn.get(key) is not None:
            made[key] = text(turn[key], f"{where}.{key}")
    weight = turn.get("weight")
    if weight is not None:
        if isinstance(weight, bool) or weight not in (0, 1):
            raise RowError(f"{where}.weight", f"must be 0 or 1, not {quote(weight)}")
        made["weight"] = int(weight)
    return made


def _join_parts(parts: list[Any], where: str) -> str:
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RowError(f"{where}[{index}]", 'only text parts {"type": "text", "text": …} can be learnt from')
    return "".join(part["text"] for part in parts)


def sharegpt_turn(turn: Any, where: str) -> Message:
    """``{"from": …, "value": …}`` as a message. Raises RowError."""
    if not isinstance(turn, dict):
        raise RowError(where, f"must be an object with from and value, not {kind(turn)}")
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        what = "from is missing" if speaker is None else f"unknown speaker {quote(speaker)}"
        raise RowError(f"{where}.from", f"{what}; known are {', '.join(SHAREGPT_ROLES)}")
    role = SHAREGPT_ROLES[speaker]
    if turn.get("value") is None:
        raise RowError(f"{where}.value", "value is missing")
    return {"role": role, "content": text(turn["value"], f"{where}.value", needed=role == "assistant")}


def items(row: Mapping[str, Any], name: str) -> list[Any]:
    """A field that must be a list with something in it."""
    value = row.get(name)
    if not isinstance(value, list):
        raise RowError(name, "is missing" if value is None else f"must be a list, not {kind(value)}")
    if not value:
        raise RowError(name, "is empty")
    return value


def field_of(row: Mapping[str, Any], name: str, *, needed: bool = False) -> str:
    """A field that must be a text; ``needed``: and not blank."""
    if row.get(name) is None:
        raise RowError(name, "is missing")
    return text(row[name], name, needed=needed)


def text(value: Any, where: str, *, needed: bool = False) -> str:
    """A text that a tokenizer and a database can hold."""
    if not isinstance(value, str):
        raise RowError(where, f"must be a string, not {kind(value)}")
    if needed and not value.strip():
        raise RowError(where, "is empty, so there is nothing to learn")
    if "\x00" in value:
        raise RowError(where, "contains a NUL character")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(where, f"contains a lone surrogate at character {error.start + 1}") from None
    return value
