"""One turn of a conversation, read strictly: every fault names its field (stdlib only)."""

import json
from collections.abc import Mapping
from typing import Any

from app.files.json_rows import MAX_DEPTH, Unit, deeper_than, kind, quote

Message = dict[str, Any]
"""``role`` (system, user, assistant, tool), ``content``, and where given ``weight``, ``tool_calls``, ``name``.

``tool_calls`` are as in OpenAI's API, but for their arguments, which are an object: that is what templates take.
"""

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
    if calls is not None:
        calls = tool_calls(calls, f"{where}.tool_calls")
    if calls and role != "assistant":
        raise RowError(f"{where}.tool_calls", f"only the assistant calls tools, and this is a {role} turn")
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
    value = text(turn["value"], f"{where}.value", needed=role == "assistant")
    if speaker == "function_call":
        called = from_json(value, f"{where}.value")
        calls = tool_calls(called if isinstance(called, list) else [called], f"{where}.value")
        return {"role": role, "content": "", "tool_calls": calls}
    return {"role": role, "content": value}


def tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls in OpenAI's shape, or bare ``{"name": …, "arguments": …}``; arguments may be JSON text. Raises RowError."""
    if not isinstance(calls, list):
        raise RowError(where, f"must be a list of calls, not {kind(calls)}")
    return [_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise RowError(where, f"must be an object, not {kind(call)}")
    if call.get("type", "function") != "function":
        raise RowError(f"{where}.type", f"must be function, not {quote(call['type'])}")
    wrapped = "function" in call
    inner, place = (call["function"], f"{where}.function") if wrapped else (call, where)
    if not isinstance(inner, dict):
        raise RowError(place, f"must be an object with name and arguments, not {kind(inner)}")
    if inner.get("name") is None:
        raise RowError(f"{place}.name", "is missing")
    name = text(inner["name"], f"{place}.name", needed=True)
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        arguments = from_json(arguments, f"{place}.arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        what = "are missing" if arguments is None else f"must be an object, not {kind(arguments)}"
        raise RowError(f"{place}.arguments", what)
    text(json.dumps(arguments, ensure_ascii=False), f"{place}.arguments")
    made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        made["id"] = text(call["id"], f"{where}.id")
    return made


def from_json(value: str, where: str) -> Any:
    """What a text holds that must be JSON. Raises RowError."""
    try:
        found = json.loads(value, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RowError(where, f"must be JSON: {error}") from None
    if isinstance(found, dict | list) and deeper_than(found, MAX_DEPTH):
        raise RowError(where, f"nested deeper than {MAX_DEPTH} levels")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


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
