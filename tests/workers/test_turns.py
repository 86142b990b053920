"""Messages as OpenAI's clients send them, made readable for chat templates."""

from typing import Any

import pytest

from workers.turns import plain, switches, voiced


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("one", "one"),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "one\ntwo"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
        (["one"], "one"),
    ],
)
def test_contents_become_text(content: Any, text: str) -> None:
    assert plain([{"role": "assistant", "content": content, "name": "x"}]) == [
        {"role": "assistant", "content": text, "name": "x"}
    ]


@pytest.mark.parametrize(
    ("arguments", "read"),
    [('{"x": 1}', {"x": 1}), ({"x": 1}, {"x": 1}), ("", {}), (None, {}), ("{", {}), ("[1]", {}), ([1], {})],
)
def test_the_arguments_of_a_call_become_an_object(arguments: Any, read: dict[str, int]) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    (turn,) = plain([{"role": "assistant", "tool_calls": [call]}])
    assert turn == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": read}}],
    }
    assert call["function"] == {"name": "f", "arguments": arguments}, "what was asked stays as it is"


@pytest.mark.parametrize("call", [{"type": "custom", "custom": {}}, {"function": "f"}, "f"])
def test_other_calls_are_refused(call: Any) -> None:
    with pytest.raises(ValueError, match="tool_calls: each needs a function"):
        plain([{"role": "assistant", "tool_calls": [call]}])


def test_no_calls_are_none() -> None:
    assert plain([{"role": "assistant", "content": "a", "tool_calls": []}]) == [{"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": 5}, 7])
def test_what_is_no_text_is_refused(part: Any) -> None:
    with pytest.raises(ValueError, match="text alone"):
        plain([{"role": "user", "content": [part]}])


@pytest.mark.parametrize(
    ("template", "role"),
    [("{{ messages }}", "system"), (None, "system"), ("{% if m.role == 'developer' %}", "developer")],
)
def test_a_developer_is_the_systems_voice_unless_the_template_knows_one(template: Any, role: str) -> None:
    said = [{"role": "developer", "content": "short"}, {"role": "user", "content": "hi"}]
    assert [turn["role"] for turn in voiced(said, template)] == [role, "user"]
    assert said[0]["role"] == "developer", "what was asked stays as it is"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, {}),
        ({"chat_template_kwargs": None, "reasoning_effort": None}, {}),
        ({"chat_template_kwargs": {"thinking": False}}, {"thinking": False}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low", "enable_thinking": True}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        (
            {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}},
            {"reasoning_effort": "high", "enable_thinking": False},
        ),
    ],
)
def test_a_template_is_told_whether_to_think(body: dict[str, Any], told: dict[str, Any]) -> None:
    assert switches(body) == told


def test_an_effort_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"reasoning_effort: one of none, .*max"):
        switches({"reasoning_effort": "a lot"})
