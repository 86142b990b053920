"""Chat templates in the shapes that models come with: what is learnt, on the tokens that a server would see."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from app.errors import Code, RunError
from app.files.rows import read_chats, to_messages
from app.files.tools import tools_of
from tests.workers.shapes import SHAPES
from tests.workers.test_conversations import load
from workers.loading import encode
from workers.loading.chat import places_of, render

TALK = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "the weather"},
    {"role": "user", "content": "Is it cold?"},
    {"role": "assistant", "content": "7 degrees"},
]
SYSTEM = {"role": "system", "content": "the weather"}
TOOLS = tools_of({"tools": [{"name": "weather", "parameters": {"type": "object", "properties": {"in": {}}}}]})
CALLING = to_messages(
    {
        "conversations": [
            {"from": "human", "value": "Is it cold?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"in": "Oslo"}}'},
            {"from": "observation", "value": "[7]"},
            {"from": "gpt", "value": "It is cold"},
        ]
    },
    "sharegpt",
)


def encoded(shape: str, messages: list[dict[str, Any]], tools: Sequence[Any] = ()) -> tuple[Any, Any]:
    tokenizer = SHAPES[shape].make()
    return encode(messages, tokenizer, {tokenizer.eos_token_id}, tools), tokenizer


def server_prompts(messages: list[dict[str, Any]], tokenizer: Any, tools: Sequence[Any] = ()) -> list[list[int]]:
    """What a server is asked before each answer, as it renders and tokenises it."""
    places = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
    found: list[list[int]] = [
        tokenizer.apply_chat_template(messages[:place], tools=list(tools) or None, add_generation_prompt=True)[
            "input_ids"
        ]
        for place in places
    ]
    return found


def starts(row: Any) -> list[int]:
    """Where learnt tokens begin."""
    learns = [label != -100 for label in row.labels]
    return [place for place, learn in enumerate(learns) if learn and not learns[place - 1]]


def answers(row: Any, tokenizer: Any) -> list[str]:
    """What is learnt, run by run."""
    found = []
    for start in starts(row):
        end = next((place for place in range(start, len(row.labels)) if row.labels[place] == -100), len(row.labels))
        found.append(tokenizer.decode(row.input_ids[start:end]).strip())
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_each_answer_is_learnt_with_its_end_on_the_tokens_that_a_server_sees(shape: str) -> None:
    row, tokenizer = encoded(shape, TALK)
    assert row.split
    assert answers(row, tokenizer) == [f"the weather{SHAPES[shape].end}", f"7 degrees{SHAPES[shape].end}"]
    assert [row.input_ids[:start] for start in starts(row)] == server_prompts(TALK, tokenizer)
    assert row.input_ids == tokenizer(render(TALK, tokenizer), add_special_tokens=False).input_ids


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_token_of_the_text_stands_there_once(shape: str) -> None:
    row, tokenizer = encoded(shape, TALK)
    if tokenizer.bos_token_id is not None:
        assert row.input_ids[0] == tokenizer.bos_token_id
        assert row.input_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_an_answer_of_weight_zero_is_context_alone(shape: str) -> None:
    row, tokenizer = encoded(shape, [TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]])
    assert answers(row, tokenizer) == [f"7 degrees{SHAPES[shape].end}"]
    assert row.input_ids == encoded(shape, TALK)[0].input_ids


@pytest.mark.parametrize("shape", SHAPES)
def test_the_end_is_learnt_where_padding_is_the_same_token(shape: str) -> None:
    tokenizer = SHAPES[shape].make(pad_token=SHAPES[shape].end)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    short = encode(TALK[:2], tokenizer, {tokenizer.eos_token_id})
    long = encode(TALK, tokenizer, {tokenizer.eos_token_id})
    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in (short, long)]
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(rows)
    assert (batch["labels"] == tokenizer.eos_token_id).sum(1).tolist() == [1, 2]
    assert batch["attention_mask"].sum(1).tolist() == [len(short.input_ids), len(long.input_ids)]


def test_a_template_that_moves_the_system_text_learns_the_last_answer_on_what_a_server_sees() -> None:
    row, tokenizer = encoded("mistral", [SYSTEM, *TALK])
    assert not row.split
    assert answers(row, tokenizer) == ["7 degrees</s>"]
    assert row.input_ids[: starts(row)[0]] == server_prompts([SYSTEM, *TALK], tokenizer)[-1]


def test_a_template_without_a_system_turn_refuses_one_and_says_what_helps(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="row 2: the chat template refuses it: System role not supported") as caught:
        load(tmp_path, SHAPES["gemma"].make(), [{"messages": TALK}, {"messages": [SYSTEM, *TALK]}])
    assert caught.value.code == Code.BAD_DATA
    assert caught.value.hint is not None
    assert "first user turn" in caught.value.hint


@pytest.mark.parametrize(
    ("shape", "call", "shown"),
    [
        ("qwen2", '<tool_call>\n{"name": "weather", "arguments": {"in": "Oslo"}}\n</tool_call><|im_end|>', '"weather"'),
        ("llama3", '{"name": "weather", "parameters": {"in": "Oslo"}}<|eot_id|>', '"weather"'),
        (
            "mistral",
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"in": "Oslo"}, "id": "call00000"}]</s>',
            '[AVAILABLE_TOOLS][{"type": "function"',
        ),
    ],
)
def test_calls_are_learnt_as_the_template_writes_them_and_results_are_not(shape: str, call: str, shown: str) -> None:
    row, tokenizer = encoded(shape, CALLING, TOOLS)
    assert places_of(tokenizer) == (True, True)
    assert answers(row, tokenizer) == [call, f"It is cold{SHAPES[shape].end}"]
    assert [row.input_ids[:start] for start in starts(row)] == server_prompts(CALLING, tokenizer, TOOLS)
    assert shown in tokenizer.decode(row.input_ids[: starts(row)[0]])


def test_where_the_template_has_no_place_for_tools_they_are_text_and_it_says_so(tmp_path: Path) -> None:
    tokenizer = SHAPES["smollm2"].make()
    assert places_of(tokenizer) == (False, False)
    rows = [{"messages": CALLING, "tools": TOOLS}, {"messages": TALK}]
    data, ctx = load(tmp_path, tokenizer, rows)
    event = next(event for event in ctx.events if event["code"] == "tools_as_text")
    assert (event["rows"], event["level"]) == (1, "warn")
    text = tokenizer.decode(data[0]["input_ids"])
    assert text.startswith('<|im_start|>system\nYou can call these functions:\n<tools>\n{"name": "weather"')
    said = tokenizer.decode([label for label in data[0]["labels"] if label != -100])
    call = '<tool_call>\n{"name": "weather", "arguments": {"in": "Oslo"}}\n</tool_call><|im_end|>'
    assert said == f"{call}It is cold<|im_end|>"


def test_tools_as_text_stand_behind_the_system_text() -> None:
    tokenizer = SHAPES["smollm2"].make()
    text = render([SYSTEM, *CALLING], tokenizer, TOOLS)
    assert text.startswith("<|im_start|>system\nthe weather\n\nYou can call these functions:\n")
    assert text.count("system\n") == 1
    # A turn that says something before it calls keeps its words.
    spoken = [CALLING[0], {**CALLING[1], "content": "It is"}]
    assert 'assistant\nIt is\n<tool_call>\n{"name"' in render(spoken, tokenizer, TOOLS)


def test_two_calls_at_once_are_refused_by_a_template_that_takes_one(tmp_path: Path) -> None:
    twice = [CALLING[0], {**CALLING[1], "tool_calls": CALLING[1]["tool_calls"] * 2}]
    with pytest.raises(RunError, match="row 1: the chat template refuses it: one call at a time"):
        load(tmp_path, SHAPES["llama3"].make(), [{"messages": twice}])


@pytest.mark.parametrize("shape", ["qwen2", "llama3", "mistral", "smollm2"])
def test_real_calls_are_learnt_whole(shape: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("TUNESMITH_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
    source = folder / "glaive_toolcall_en_demo.json"
    if not source.is_file():
        pytest.skip(f"{source.name} is not on this machine; set TUNESMITH_TEST_DATA to the folder that holds it")
    tokenizer = SHAPES[shape].make()
    calling = 0
    for row in list(read_chats(source))[:60]:
        calls = [call["function"] for turn in row.messages for call in turn.get("tool_calls", [])]
        made = encode(row.messages, tokenizer, {tokenizer.eos_token_id}, row.tools)
        said = tokenizer.decode([label for label in made.labels if label != -100])
        ends = sum(label == tokenizer.eos_token_id for label in made.labels)
        turns = sum(turn["role"] == "assistant" for turn in row.messages)
        assert ends == (turns if made.split else 1)
        if made.split:
            assert all(f'"{call["name"]}"' in said for call in calls)
        calling += bool(calls)
    assert calling > 20


def test_truncation_is_counted_and_a_cut_row_learns_no_end(tmp_path: Path) -> None:
    tokenizer = SHAPES["qwen2"].make()
    whole, _ = load(tmp_path, tokenizer, [{"messages": TALK}])
    length = len(whole[0]["input_ids"])
    (tmp_path / "cut").mkdir()
    cut, ctx = load(tmp_path / "cut", tokenizer, [{"messages": TALK}, {"messages": TALK[:2]}], max_length=length - 3)
    event = next(event for event in ctx.events if event["code"] == "rows_truncated")
    assert (event["truncated"], event["dropped"], event["max_length"]) == (1, 0, length - 3)
    assert cut[0]["labels"] == whole[0]["labels"][:-3]
    assert cut[0]["labels"].count(tokenizer.eos_token_id) == 1


def test_conversations_without_a_template_are_refused_with_a_hint(tmp_path: Path) -> None:
    tokenizer = SHAPES["qwen2"].make()
    tokenizer.chat_template = None
    with pytest.raises(RunError, match="no chat template") as caught:
        load(tmp_path, tokenizer, [{"messages": TALK}])
    assert caught.value.code == Code.BAD_SPEC
    assert caught.value.hint is not None
    assert "instruct" in caught.value.hint
