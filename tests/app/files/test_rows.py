"""Dataset files: what cannot be learnt from is named by line and field; what can be is read the same way everywhere."""

import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.files import json_rows
from app.files.rows import FileReport, check, detect, first_format, read, read_pairs, to_messages
from app.files.turns import RowError

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
GOOD_LINE = json.dumps(GOOD).encode()


def report_on(tmp_path: Path, content: bytes | str, format: Any = "auto") -> FileReport:
    path = tmp_path / "data"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return check(path, format)


def report_on_rows(tmp_path: Path, *rows: Any) -> FileReport:
    return report_on(tmp_path, "\n".join(json.dumps(row) for row in rows))


def test_every_fault_is_reported_with_its_line(tmp_path: Path) -> None:
    lines = [
        GOOD_LINE,
        b"",
        b'{"messages": [',
        b"[1, 2]",
        b'{"messages": [{"role": "user", "content": NaN}]}',
        b'{"messages": [], "messages": []}',
        b'{"messages": "\xff"}',
        b'{"a": "\x00"}',
        GOOD_LINE,
    ]
    report = report_on(tmp_path, b"\r\n".join(lines))
    assert [problem.line for problem in report.problems] == [3, 4, 5, 6, 7, 8]
    assert [problem.message for problem in report.problems] == [
        "not valid JSON: Expecting value (column 15)",
        "a row must be a JSON object, not a list",
        "NaN is no JSON value",
        "the key appears twice",
        "not valid UTF-8 at byte 15 of the line",
        "the line contains NUL bytes",
    ]
    assert (report.rows, report.bad_rows, report.unit) == (8, 6, "line")


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
def test_literals_that_json_does_not_have_are_refused(tmp_path: Path, literal: str) -> None:
    report = report_on(tmp_path, f'{{"prompt": "a", "completion": "b", "x": {literal}}}')
    assert report.problems == [(1, "", f"{literal} is no JSON value")]


@pytest.mark.parametrize(
    ("turns", "field", "message"),
    [
        ([], "messages", "is empty"),
        ("hi", "messages", "must be a list, not a string"),
        (None, "messages", "is missing"),
        (["hi"], "messages[0]", "must be an object"),
        ([{"content": "hi"}], "messages[0].role", "role is missing"),
        ([{"role": "robot", "content": "hi"}], "messages[0].role", "unknown role 'robot'"),
        ([{"role": ["user"], "content": "hi"}], "messages[0].role", "unknown role ['user']"),
        ([{"role": "user"}], "messages[0].content", "content is missing"),
        ([{"role": "user", "content": 3}], "messages[0].content", "must be a string, not a number"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]", "only text parts"),
        ([{"role": "user", "content": "a\x00b"}], "messages[0].content", "NUL"),
        ([{"role": "user", "content": "a\ud800"}], "messages[0].content", "lone surrogate at character 2"),
        ([{"role": "user", "content": "hi"}], "messages", "no assistant turn"),
        ([{"role": "assistant", "content": "hi"}], "messages", "only assistant turns"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}], "messages[1].content", "is empty"),
        (
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}],
            "messages[1].weight",
            "must be 0 or 1",
        ),
        (
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}],
            "messages",
            "weight 0",
        ),
        (
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": "f()"}],
            "messages[1].tool_calls",
            "must be a list",
        ),
    ],
)
def test_a_bad_conversation_names_the_field(tmp_path: Path, turns: Any, field: str, message: str) -> None:
    report = report_on_rows(tmp_path, GOOD, {"messages": turns})
    assert len(report.problems) == 1
    problem = report.problems[0]
    assert (problem.line, problem.field) == (2, field)
    assert message in problem.message
    problem.message.encode()  # printable, whatever the file held


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "a", "completion": None}, "completion"),
        ({"prompt": "a", "completion": ""}, "completion"),
        ({"prompt": ["a"], "completion": "b"}, "prompt"),
        ({"question": "a", "answer": 3}, "answer"),
        ({"instruction": "a", "output": None}, "output"),
        ({"instruction": "", "input": "", "output": "b"}, "instruction"),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, "history[0]"),
        ({"instruction": "a", "output": "b", "history": "q"}, "history"),
        ({"conversations": [{"from": "bing", "value": "a"}]}, "conversations[0].from"),
        ({"conversations": [{"value": "a"}]}, "conversations[0].from"),
        ({"conversations": [{"from": "human"}]}, "conversations[0].value"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "conversations"),
        ({"title": "a"}, ""),
        ({"text": ""}, "text"),
    ],
)
def test_a_bad_row_of_any_shape_names_the_field(tmp_path: Path, row: dict[str, Any], field: str) -> None:
    report = report_on_rows(tmp_path, row)
    assert [(problem.line, problem.field) for problem in report.problems] == [(1, field)]


def test_a_file_of_two_shapes_is_refused_at_the_row_that_differs(tmp_path: Path) -> None:
    report = report_on_rows(tmp_path, GOOD, {"prompt": "a", "completion": "b"}, GOOD)
    assert report.problems == [(2, "", "mixed shapes: this row is prompt_completion, the file is messages")]


def test_a_format_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    assert report_on(tmp_path, GOOD_LINE, "alpaca").problems[0].message.startswith("mixed shapes")
    report = report_on_rows(tmp_path, {"x": 1})
    assert report.problems[0].message.startswith("unknown shape: fields ['x']")


@pytest.mark.parametrize("content", ["", "\n\n \r\n", "\ufeff", "[]", " [ ] "])
def test_an_empty_file_is_a_problem(tmp_path: Path, content: str) -> None:
    assert report_on(tmp_path, content).problems == [(1, "", "the file is empty: it holds no row")]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (gzip.compress(GOOD_LINE, mtime=0), "gzip"),
        (b"PK\x03\x04abc", "zip"),
        (b"PAR1abc", "Parquet"),
        (GOOD_LINE.decode().encode("utf-16"), "UTF-16"),
        (GOOD_LINE.decode().encode("utf-16-le"), "UTF-16"),
        (GOOD_LINE.decode().encode("utf-16-be"), "UTF-16"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes, word: str) -> None:
    report = report_on(tmp_path, content)
    assert len(report.problems) == 1
    assert word in report.problems[0].message


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"messages": [{"role": '])
def test_deep_nesting_is_a_problem_and_no_crash(tmp_path: Path, opening: str) -> None:
    for depth in (200, 100_000):
        line = '{"a":' * depth + "1" + "}" * depth
        report = report_on(tmp_path, GOOD_LINE + b"\n" + line.encode())
        assert "nested" in report.problems[0].message
        assert report_on(tmp_path, opening * depth).problems


def test_a_line_over_the_cap_is_skipped_with_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "data"
    with path.open("wb") as file:
        file.write(GOOD_LINE + b"\n")
        for _ in range(64):
            file.write(b"x" * (1 << 20))
        file.write(b"\n" + GOOD_LINE + b"\n")
    tracemalloc.start()
    report = check(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.problems == [(2, "", "the line is longer than 16 MiB")]
    assert report.rows == 3
    assert peak < 4 * json_rows.MAX_ROW_BYTES


def test_a_number_with_too_many_digits_is_a_problem(tmp_path: Path) -> None:
    report = report_on(tmp_path, '{"a": ' + "9" * 10_000 + "}")
    assert "not valid JSON" in report.problems[0].message


def test_only_the_first_problems_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    report = report_on(tmp_path, "x\n" * 100)
    assert len(report.problems) == 20
    assert (report.bad_rows, report.problems[-1].line) == (100, 20)


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("", "the array is not closed"),
        (",]", "trailing comma before the closing bracket"),
        (" {}]", "expected a comma"),
        ("] x", "text after the closing bracket of the array"),
        (", {]", "not valid JSON"),
        (", tru]", "not valid JSON"),
        (', {"a": NaN}]', "NaN is no JSON value"),
    ],
)
def test_a_broken_array_is_reported_at_its_row(tmp_path: Path, tail: str, message: str) -> None:
    report = report_on(tmp_path, "[" + json.dumps(GOOD) + tail)
    assert (report.unit, report.rows) == ("row", 1)
    assert [problem.line for problem in report.problems] == [2]
    assert message in report.problems[0].message


def test_elements_of_an_array_that_are_no_objects_are_reported_by_position(tmp_path: Path) -> None:
    report = report_on(tmp_path, f'[{json.dumps(GOOD)}, 12, "x", null]')
    assert [problem.line for problem in report.problems] == [2, 3, 4]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_the_size_of_the_reading_window_does_not_matter(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", size)
    rows = [{"prompt": f"q{n} é 漢", "completion": "a" * n} for n in range(1, 20)]
    path = tmp_path / "data"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=2))
    assert [turns[1]["content"] for turns in read(path)] == ["a" * n for n in range(1, 20)]
    path.write_text("[123, 4567]")
    assert [problem.message for problem in check(path).problems] == ["a row must be a JSON object, not a number"] * 2


def test_bom_crlf_and_blank_lines_are_tolerated(tmp_path: Path) -> None:
    report = report_on(tmp_path, b"\xef\xbb\xbf" + GOOD_LINE + b"\r\n\r\n  \r\n" + GOOD_LINE)
    assert report.ok
    assert (report.format, report.rows, report.longest_row) == ("messages", 2, 7)
    assert report.bytes == 3 + 2 * len(GOOD_LINE) + 8


def test_weights_parts_tool_calls_and_developer_messages_are_kept() -> None:
    call: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 42}'}}
    read_call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 42}}}
    row = {
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": "42", "tool_call_id": "1"},
            {"role": "assistant", "content": "it is 42", "weight": 1},
        ]
    }
    assert to_messages(row, "messages") == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": [read_call], "weight": 0},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "assistant", "content": "it is 42", "weight": 1},
    ]


@pytest.mark.parametrize(
    ("row", "format", "turns"),
    [
        ({"prompt": "a", "completion": "b"}, "prompt_completion", [("user", "a"), ("assistant", "b")]),
        ({"question": "a", "answer": "b"}, "prompt_completion", [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "output": "b"}, "alpaca", [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "input": "x", "output": "b"}, "alpaca", [("user", "a\nx"), ("assistant", "b")]),
        (
            {"instruction": "a", "output": "b", "system": "s", "history": [["q", "r"]]},
            "alpaca",
            [("system", "s"), ("user", "q"), ("assistant", "r"), ("user", "a"), ("assistant", "b")],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "b"},
                ],
                "system": "s",
            },
            "sharegpt",
            [("system", "s"), ("user", "a"), ("assistant", ""), ("tool", "1"), ("assistant", "b")],
        ),
    ],
)
def test_each_shape_becomes_a_conversation(row: dict[str, Any], format: Any, turns: list[tuple[str, str]]) -> None:
    assert detect(row) == format
    assert [(message["role"], message["content"]) for message in to_messages(row, format)] == turns


def test_reading_stops_at_the_first_bad_row_and_names_it(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(GOOD_LINE + b"\n\n{}\n")
    rows = read(path)
    assert [message["role"] for message in next(rows)] == ["user", "assistant"]
    with pytest.raises(RowError, match="line 3: messages: is missing"):
        next(rows)


FIELDS = [
    "messages",
    "role",
    "content",
    "weight",
    "prompt",
    "completion",
    "instruction",
    "output",
    "from",
    "value",
    "chosen",
]
FIELDS += ["rejected", "conversations", "input"]
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(json_values, max_size=4) | json_values)
def test_no_json_value_crashes_the_check(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("rows") / "data"
    path.write_text(json.dumps(value))
    report = check(path)
    for problem in report.problems:
        f"{problem.field}{problem.message}".encode()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet='[]{}",:\\ \n01aeNu\ud800', max_size=60))
def test_no_bytes_crash_the_check(tmp_path_factory: pytest.TempPathFactory, content: bytes | str) -> None:
    path = tmp_path_factory.mktemp("rows") / "data"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    report = check(path)
    assert report.problems or report.rows


@pytest.mark.parametrize(
    ("name", "format", "rows", "good"),
    [
        ("gsm8k_train.jsonl", "prompt_completion", 7473, True),
        ("gsm8k_test.jsonl", "prompt_completion", 1319, True),
        ("alpaca_en_demo.json", "alpaca", 999, True),
        ("identity.json", "alpaca", 91, True),
        ("glaive_toolcall_en_demo.json", "sharegpt", 300, True),
        ("kto_en_demo.json", "messages", 300, True),
        ("dpo_en_demo.json", "preference", 300, True),
    ],
)
def test_real_files_are_read(name: str, format: str, rows: int, good: bool) -> None:
    folder = Path(os.environ.get("TUNESMITH_TEST_DATA") or Path(__file__).parents[4] / "shared" / "data")
    if not (folder / name).is_file():
        pytest.skip(f"{name} is not on this machine; set TUNESMITH_TEST_DATA to the folder that holds it")
    report = check(folder / name)
    assert (report.format, report.rows, report.ok) == (format, rows, good)
    assert first_format(folder / name) == format
    if good:
        assert sum(1 for _ in (read_pairs if format == "preference" else read)(folder / name)) == rows
