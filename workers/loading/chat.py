"""A conversation as text: the model's own chat template renders it, with its tools and the calls of them.

Where a template has no place for tools or for calls, it would leave them out without a word, and the model would learn
to say nothing. There they are written as text, in the form that the tool parser ``hermes`` of serving engines reads.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from app.files.tools import Tool
from app.files.turns import Message

_PROBE = "tool_of_a_probe"


class Places(NamedTuple):
    """What a chat template has a place for."""

    tools: bool
    calls: bool


def render(
    messages: Sequence[Message], tokenizer: Any, tools: Sequence[Tool] = (), *, opening: bool = False, **switches: Any
) -> str:
    """The text that a server would see. ``opening``: with the beginning of an answer; ``switches`` are the template's.

    Raises what the template raises (of jinja2) for a conversation that it refuses.
    """
    turns = [{key: value for key, value in turn.items() if key != "weight"} for turn in messages]
    if lacks_place(messages, tokenizer, tools):
        places = places_of(tokenizer)
        turns = turns if places.calls else [_with_calls_as_text(turn) for turn in turns]
        if tools and not places.tools:
            turns, tools = _with_tools_as_text(turns, tools), ()
    return str(
        tokenizer.apply_chat_template(
            turns, tools=list(tools) or None, tokenize=False, add_generation_prompt=opening, **switches
        )
    )


def lacks_place(messages: Sequence[Message], tokenizer: Any, tools: Sequence[Tool] = ()) -> bool:
    """Whether something of the row is written as text, because the template has no place for it."""
    calls = any(turn.get("tool_calls") for turn in messages)
    if not (tools or calls):
        return False
    places = places_of(tokenizer)
    return bool(tools) and not places.tools or calls and not places.calls


def places_of(tokenizer: Any) -> Places:
    """Tried out: whether the name of a tool turns up in what the template makes."""
    return _places(tokenizer, json.dumps(tokenizer.chat_template))


@functools.lru_cache(maxsize=4)
def _places(tokenizer: Any, template: str) -> Places:
    function: Tool = {"name": _PROBE, "description": "x", "parameters": {"type": "object", "properties": {}}}
    call: Tool = {"id": "call00000", "type": "function", "function": {"name": _PROBE, "arguments": {}}}
    asked: Message = {"role": "user", "content": "x"}
    called: list[Message] = [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return Places(
        tools=_PROBE in _tried(tokenizer, [asked], [{"type": "function", "function": function}]),
        calls=_PROBE in _tried(tokenizer, called, None),
    )


def _tried(tokenizer: Any, turns: list[Message], tools: list[Tool] | None) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tools=tools, tokenize=False))
    except Exception:  # a template that fails on it has no place for it
        return ""


def _with_calls_as_text(turn: Mapping[str, Any]) -> Message:
    calls = [call["function"] for call in turn.get("tool_calls", [])]
    texts = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls]
    rest = {key: value for key, value in turn.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join([turn["content"], *texts] if turn["content"] else texts or [""])}


def _with_tools_as_text(turns: list[Message], tools: Sequence[Tool]) -> list[Message]:
    """In the system turn, which is made where there is none."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = (
        f"You can call these functions:\n<tools>\n{listed}\n</tools>\n"
        'To call one, answer <tool_call>\n{"name": …, "arguments": {…}}\n</tool_call> with its name and arguments.'
    )
    if turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{text}"}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]


def refusal(messages: Sequence[Message], error: Exception) -> tuple[str, str] | None:
    """What to say of a conversation that a template refused, and what helps; None where it was no template."""
    # Templates raise whatever jinja2 raises, and raise_exception() for orders of roles that they refuse.
    if type(error).__module__.partition(".")[0] != "jinja2":
        return None
    hint = "change the turns, or use a model whose template takes them"
    if any(turn["role"] == "system" for turn in messages):
        hint = "where the template takes no system turn, put its text at the start of the first user turn"
    elif any(turn["role"] == "tool" for turn in messages):
        hint = "where the template takes no results of tools, use a model that was made for them"
    return f"the chat template refuses it: {error}", hint
