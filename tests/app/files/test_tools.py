"""Tools and calls of them: OpenAI's and ShareGPT's shapes become one, and every fault names its place."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.files.rows import check, read_chats, read_pairs, to_messages
from app.files.tools import tools_of
from app.files.turns import RowError

WEATHER = {"name": "weather", "description": "Now", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": WEATHER}


def call(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": function}


def turns(*calls: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": list(calls)},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "a"},
    ]


@pytest.mark.parametrize(
    "tools", [[WRAPPED], [WEATHER], json.dumps([WRAPPED]), json.dumps([WEATHER]), [{"type": "function", **WEATHER}]]
)
def test_tools_are_read_in_every_shape(tools: Any) -> None:
    assert tools_of({"tools": tools}) == [WRAPPED]


@pytest.mark.parametrize("tools", [None, "", "  ", "[]", []])
def test_no_tools_are_no_fault(tools: Any) -> None:
    assert tools_of({"tools": tools}) == []


@pytest.mark.parametrize(
    ("tools", "field", "message"),
    [
        ("weather", "tools", "must be JSON"),
        ("{}", "tools", "must be a list of functions, not an object"),
        (7, "tools", "must be a list of functions, not a number"),
        (["weather"], "tools[0]", "must be an object, not a string"),
        ([WRAPPED, {"type": "function"}], "tools[1].name", "is missing"),
        ([{"function": "weather"}], "tools[0].function", "must be an object with a name"),
        ([{"function": {"name": " "}}], "tools[0].function.name", "is empty"),
        ([{"name": "f", "parameters": "x"}], "tools[0].parameters", "must be an object, not a string"),
        ([{"name": "f", "description": "\ud800"}], "tools[0]", "lone surrogate"),
        ("[" * 200 + "]" * 200, "tools", "nested deeper than 100"),
    ],
)
def test_a_bad_tool_names_its_place(tmp_path: Path, tools: Any, field: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": turns(call(name="f", arguments={})), "tools": tools}))
    report = check(path)
    assert [(problem.line, problem.field) for problem in report.problems] == [(1, field)]
    assert message in report.problems[0].message


@pytest.mark.parametrize(
    ("bad", "field", "message"),
    [
        ("f()", "messages[1].tool_calls[0]", "must be an object, not a string"),
        ({"type": "web_search"}, "messages[1].tool_calls[0].type", "must be function"),
        ({"function": None}, "messages[1].tool_calls[0].function", "must be an object with name and arguments"),
        (call(arguments={}), "messages[1].tool_calls[0].function.name", "is missing"),
        (call(name="f"), "messages[1].tool_calls[0].function.arguments", "are missing"),
        (call(name="f", arguments="x = 1"), "messages[1].tool_calls[0].function.arguments", "must be JSON"),
        (call(name="f", arguments="[1]"), "messages[1].tool_calls[0].function.arguments", "an object, not a list"),
        (call(name="f", arguments='{"x": NaN}'), "messages[1].tool_calls[0].function.arguments", "NaN is no JSON"),
        (call(name="f", arguments={"x": "\ud800"}), "messages[1].tool_calls[0].function.arguments", "lone surrogate"),
        ({**call(name="f", arguments={}), "id": 7}, "messages[1].tool_calls[0].id", "must be a string"),
    ],
)
def test_a_bad_call_names_its_place(bad: Any, field: str, message: str) -> None:
    with pytest.raises(RowError) as caught:
        to_messages({"messages": turns(bad)}, "messages")
    assert caught.value.field == field
    assert message in caught.value.message


def test_only_the_assistant_calls_tools() -> None:
    row = {"messages": [{"role": "user", "content": "q", "tool_calls": [call(name="f", arguments={})]}]}
    with pytest.raises(RowError, match="only the assistant calls tools"):
        to_messages(row, "messages")


def test_results_belong_to_calls_by_id_or_by_their_order() -> None:
    first, second = ({**call(name=name, arguments={})} for name in ("f", "g"))
    messages = to_messages(
        {
            "messages": [
                *turns(first, second)[:3],
                {"role": "tool", "content": "2"},
                {"role": "assistant", "content": "a"},
            ]
        },
        "messages",
    )
    ids = [one["id"] for one in messages[1]["tool_calls"]]
    assert ids == ["call00000", "call00001"]
    assert [turn["tool_call_id"] for turn in messages if turn["role"] == "tool"] == ids
    given = to_messages({"messages": turns({**first, "id": "mine"})}, "messages")
    assert given[1]["tool_calls"][0]["id"] == given[2]["tool_call_id"] == "mine"


def test_a_call_in_sharegpt_is_a_call_and_no_text() -> None:
    value = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": '{"y": "é"}'}]
    conversations = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps(value)},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "a"},
    ]
    messages = to_messages({"conversations": conversations}, "sharegpt")
    calls = [one["function"] for one in messages[1]["tool_calls"]]
    assert calls == [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": "é"}}]
    assert messages[1]["content"] == ""
    conversations[1]["value"] = "f()"
    with pytest.raises(RowError, match=r"conversations\[1\].value: must be JSON"):
        to_messages({"conversations": conversations}, "sharegpt")


def test_a_row_of_any_shape_brings_its_tools(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": turns(call(name="weather", arguments={})), "tools": [WRAPPED]}))
    assert next(read_chats(path)).tools == [WRAPPED]
    pair = {
        "input": {"messages": [{"role": "user", "content": "q"}], "tools": [WEATHER]},
        "preferred_output": [{"role": "assistant", "content": "a"}],
        "non_preferred_output": [{"role": "assistant", "content": "b"}],
    }
    path.write_text(json.dumps(pair))
    assert next(read_pairs(path)).tools == [WRAPPED]
    # A column of that name means something only where there are turns.
    path.write_text(json.dumps({"instruction": "q", "output": "a", "tools": "hammer"}))
    assert next(read_chats(path)).tools == []
