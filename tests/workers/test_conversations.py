"""Which tokens are learnt: the assistant's words and the end of its turn, exactly."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.errors import Code, RunError
from tests.workers.conftest import TEMPLATE, conversation, make_tokenizer
from tests.workers.context import RecordingContext
from workers.loading import encode, load_dataset, load_tokenizer

STRIPS_THOUGHTS = TEMPLATE.replace(
    "{{ message['content'] }}",
    "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}",
)


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return load_tokenizer(tiny, chat=True)


def learnt(row: Any, tokenizer: Any) -> str:
    """The learnt tokens as text, with a bar where something lies between them."""
    parts = [[token] if label != -100 else None for token, label in zip(row.input_ids, row.labels, strict=True)]
    text = "".join("|" if part is None else tokenizer.decode(part) for part in parts)
    while "||" in text:
        text = text.replace("||", "|")
    return text.strip("|")


def test_only_the_answer_and_its_end_are_learnt(tokenizer: Any) -> None:
    row = encode(conversation(42), tokenizer, {tokenizer.eos_token_id})
    assert learnt(row, tokenizer) == "four two<|im_end|>"
    assert all(label in (-100, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    text = tokenizer.apply_chat_template(conversation(42), tokenize=False)
    assert tokenizer.decode(row.input_ids) == text
    # The newline that the template writes behind the end token is context only.
    assert row.labels[-1] == -100
    assert tokenizer.decode(row.input_ids[-1:]) == "\n"


def test_the_prompt_is_tokenised_as_a_server_would(tokenizer: Any) -> None:
    row = encode(conversation(42), tokenizer, {tokenizer.eos_token_id})
    prompt = tokenizer.apply_chat_template(conversation(42)[:-1], add_generation_prompt=True)["input_ids"]
    assert row.input_ids[: len(prompt)] == prompt
    assert set(row.labels[: len(prompt)]) == {-100}


def test_every_turn_of_a_long_conversation_is_learnt_unless_its_weight_is_zero(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "second", "weight": 0},
        {"role": "tool", "content": "c"},
        {"role": "assistant", "content": "third", "weight": 1},
        {"role": "user", "content": "never answered"},
    ]
    row = encode(messages, tokenizer, {tokenizer.eos_token_id})
    assert learnt(row, tokenizer) == "first<|im_end|>|third<|im_end|>"
    assert "never" not in tokenizer.decode(row.input_ids)


def test_a_template_that_rewrites_history_learns_the_last_answer_on_what_it_will_see(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = STRIPS_THOUGHTS
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "hm</think>first"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "so</think>second"},
    ]
    row = encode(messages, tokenizer, {tokenizer.eos_token_id})
    assert not row.split
    assert learnt(row, tokenizer) == "so</think>second<|im_end|>"
    assert "hm" not in tokenizer.decode(row.input_ids)


def test_where_the_template_closes_no_turn_the_end_token_is_added(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    turns = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}assistant: {% endif %}"
    row = encode(conversation(7), tokenizer, {tokenizer.eos_token_id})
    assert learnt(row, tokenizer).endswith("<|im_end|>")
    assert row.labels[-1] == row.input_ids[-1] == tokenizer.eos_token_id


def test_pairs_without_a_template_are_joined_as_they_are(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, template=None)
    row = encode(
        [{"role": "user", "content": "2 + 2 ="}, {"role": "assistant", "content": " four"}],
        tokenizer,
        {tokenizer.eos_token_id},
    )
    assert tokenizer.decode(row.input_ids) == "2 + 2 = four<|im_end|>"
    assert learnt(row, tokenizer) == " four<|im_end|>"


def load(tmp_path: Path, tokenizer: Any, rows: list[Any], max_length: int = 1024) -> tuple[Any, RecordingContext]:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    ctx = RecordingContext(tmp_path)
    stops = {tokenizer.eos_token_id}
    return load_dataset(path, "auto", tokenizer, stops=stops, max_length=max_length, ctx=ctx), ctx


def test_rows_that_are_cut_are_counted_and_rows_without_an_answer_left_are_dropped(
    tmp_path: Path, tokenizer: Any
) -> None:
    long_answer = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one " * 200}]}
    long_question = {"messages": [{"role": "user", "content": "a " * 200}, {"role": "assistant", "content": "one"}]}
    data, ctx = load(tmp_path, tokenizer, [{"messages": conversation(1)}, long_answer, long_question], max_length=64)
    event = next(event for event in ctx.events if event["code"] == "rows_truncated")
    assert (event["truncated"], event["dropped"]) == (2, 1)
    assert len(data) == 2
    assert max(len(ids) for ids in data["input_ids"]) == 64


def test_a_file_of_which_nothing_is_left_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"messages": [{"role": "user", "content": "a " * 200}, {"role": "assistant", "content": "one"}]}]
    with pytest.raises(RunError, match="nothing is left to learn") as caught:
        load(tmp_path, tokenizer, rows, max_length=32)
    assert caught.value.code == Code.BAD_DATA


def test_a_bad_row_is_named(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(RunError, match=r"line 2: messages\[0\].role: unknown role 'robot'"):
        load(tmp_path, tokenizer, [{"messages": conversation(1)}, {"messages": [{"role": "robot", "content": "x"}]}])


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path, tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refuses + TEMPLATE
    with pytest.raises(RunError, match="row 1: the chat template refuses it: no system role") as caught:
        load(tmp_path, tokenizer, [{"messages": conversation(1)}])
    assert caught.value.code == Code.BAD_DATA
