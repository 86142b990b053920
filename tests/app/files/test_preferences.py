"""Rows that compare two answers, and rows that only ask: every shape, and every fault by its field."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.files.rows import Example, check, detect, read, read_pairs, read_prompts
from app.files.turns import RowError

ASK = {"role": "user", "content": "2 + 2?"}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "5"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"messages": [ASK], "chosen": GOOD, "rejected": BAD},
        {
            "conversations": [{"from": "human", "value": "2 + 2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        {"input": {"messages": [ASK]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        {"instruction": "2 + 2?", "chosen": "4", "rejected": "5"},
    ],
    ids=lambda row: "-".join(row),
)
def test_every_shape_of_a_preference(row: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", row)
    report = check(path)
    assert (report.format, report.ok, report.longest_row) == ("preference", True, 7), report.problems
    assert list(read_pairs(path)) == [Example([ASK], [GOOD], [BAD])]
    assert list(read_prompts(path)) == [[ASK]]


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected", "same as chosen"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "chosen", "is missing"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen.content", "empty"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "chosen", "must be a text, a message or a list"),
        ({"chosen": "b", "rejected": "c"}, "prompt", "nothing comes before"),
        ({"chosen": [ASK], "rejected": [ASK]}, "chosen", "assistant turn"),
        ({"prompt": [ASK, GOOD], "chosen": "b", "rejected": "c"}, "prompt", "ends with an assistant turn"),
        ({"prompt": "a", "chosen": [{"role": "robot", "content": "x"}], "rejected": "c"}, "chosen[0].role", "robot"),
        ({"conversations": [], "chosen": "b", "rejected": "c"}, "conversations", "is empty"),
    ],
)
def test_a_fault_names_its_field(row: dict[str, Any], field: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"}, row)
    (problem,) = check(path).problems
    assert (problem.line, problem.field) == (2, field)
    assert message in problem.message
    with pytest.raises(RowError, match="line 2"):
        list(read_pairs(path))


def test_prompts_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", {"prompt": "2 + 2?"}, {"prompt": [ASK]})
    assert check(path).format == "prompt"
    assert list(read_prompts(path)) == [[ASK], [ASK]]
    bad = write(tmp_path / "bad.jsonl", {"prompt": [ASK, GOOD]})
    assert [problem.field for problem in check(bad).problems] == ["prompt"]


def test_prompts_of_conversations_end_before_the_answer(tmp_path: Path) -> None:
    again = {"role": "user", "content": "Sure?"}
    path = write(tmp_path / "rows.jsonl", {"messages": [ASK, GOOD, again, GOOD]})
    assert list(read_prompts(path)) == [[ASK, GOOD, again]]


@pytest.mark.parametrize(
    ("row", "place"),
    [({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference training"), ({"prompt": "a"}, "ppo and grpo")],
)
def test_supervised_training_says_where_such_rows_belong(row: dict[str, Any], place: str, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=place):
        list(read(write(tmp_path / "rows.jsonl", row)))


def test_a_conversation_is_no_preference(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="chosen and a rejected answer"):
        list(read_pairs(write(tmp_path / "rows.jsonl", {"messages": [ASK, GOOD]})))
    with pytest.raises(RowError, match="mixed shapes"):
        list(
            read_pairs(write(tmp_path / "rows.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a"}))
        )


def test_only_known_fields_make_a_shape() -> None:
    assert detect({"prompt": "a", "completion": "b"}) == "prompt_completion"
    assert detect({"prompt": "a"}) == "prompt"
    assert detect({"chosen": "a"}) is None
