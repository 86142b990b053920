"""The tools that a row offers, and which result belongs to which call (stdlib only)."""

import json
from collections.abc import Mapping
from typing import Any

from app.files.json_rows import kind
from app.files.turns import Message, RowError, from_json, text

Tool = dict[str, Any]
"""As in OpenAI's API: ``{"type": "function", "function": {"name": …, "description": …, "parameters": …}}``."""


def tools_of(row: Mapping[str, Any]) -> list[Tool]:
    """The row's ``tools``: a list, or JSON text of one; functions may stand there bare. Raises RowError."""
    found = row.get("tools")
    if isinstance(found, str):
        found = from_json(found, "tools") if found.strip() else None
    if found is None:
        return []
    if not isinstance(found, list):
        raise RowError("tools", f"must be a list of functions, not {kind(found)}")
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(found)]


def _tool(tool: Any, where: str) -> Tool:
    if not isinstance(tool, dict):
        raise RowError(where, f"must be an object, not {kind(tool)}")
    function, place = (tool["function"], f"{where}.function") if "function" in tool else (tool, where)
    if not isinstance(function, dict):
        raise RowError(place, f"must be an object with a name, not {kind(function)}")
    if function.get("name") is None:
        raise RowError(f"{place}.name", "is missing")
    text(function["name"], f"{place}.name", needed=True)
    text(json.dumps(function, ensure_ascii=False), place)
    if not isinstance(function.get("parameters") or {}, dict):
        raise RowError(f"{place}.parameters", f"must be an object, not {kind(function['parameters'])}")
    return {"type": "function", "function": {key: value for key, value in function.items() if key != "type"}}


def numbered(messages: list[Message]) -> list[Message]:
    """Gives calls an id where they have none, and results the id of the call that they answer.

    Ids are nine letters and digits, because some templates refuse others.
    """
    count = 0
    open_calls: list[str] = []
    for message in messages:
        for call in message.get("tool_calls", []):
            if "id" not in call:
                call["id"] = f"call{count:05d}"
            count += 1
            open_calls.append(call["id"])
        if message["role"] == "tool" and open_calls:
            answered = message.setdefault("tool_call_id", open_calls[0])
            if answered in open_calls:
                open_calls.remove(answered)
    return messages
