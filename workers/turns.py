"""A chat as OpenAI's clients send it, made so that a chat template can read it; as vLLM has it."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def switches(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a chat's body tells the chat template beside the messages: whether to think, and how much.

    Raises ValueError for a ``reasoning_effort`` that is none.
    """
    effort, given = body.get("reasoning_effort"), body.get("chat_template_kwargs") or {}
    if effort is None:
        return {**given}
    if effort not in _EFFORTS:
        raise ValueError(f"reasoning_effort: one of {', '.join(_EFFORTS)}")
    # Some templates think only where they are told to, and most know no effort.
    return {"enable_thinking": effort != "none", "reasoning_effort": effort, **given}


def plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """With text in place of lists of parts, a line each, and objects in place of the JSON of a call's arguments.

    Templates would print the lists as they stand, and the JSON quoted once more. Raises ValueError for parts that are
    no text, and for calls of anything but functions.
    """
    return [_called({**message, "content": _text(message.get("content"))}) for message in messages]


def _called(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.pop("tool_calls", None)
    if calls:  # templates take an empty list for calls, too
        if not all(isinstance(call, Mapping) and isinstance(call.get("function"), Mapping) for call in calls):
            raise ValueError("messages: tool_calls: each needs a function with name and arguments")
        message["tool_calls"] = [{**call, "function": _with_object(call["function"])} for call in calls]
    return message


def _with_object(function: Mapping[str, Any]) -> dict[str, Any]:
    """What a model wrote as arguments and is no object becomes an empty one, lest the conversation end there."""
    arguments: Any = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    return {**function, "arguments": arguments if isinstance(arguments, dict) else {}}


def _text(content: Any) -> str:
    parts = content if isinstance(content, list) else [content or ""]
    texts = [part.get("text", part.get("refusal")) if isinstance(part, Mapping) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("messages: what answers here reads text alone, no images, audio or files")
    return "\n".join(texts)


def voiced(messages: Sequence[Mapping[str, Any]], template: Any) -> list[dict[str, Any]]:
    """A ``developer``, whom most templates do not know, is the system's voice."""
    known = '"developer"' in str(template) or "'developer'" in str(template)
    return [
        {**message, "role": "system"} if message.get("role") == "developer" and not known else {**message}
        for message in messages
    ]
