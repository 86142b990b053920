"""Plain text, for pretraining: a shape of its own, checked at upload like every other."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.files.rows import check, read, read_texts
from app.files.turns import RowError


def test_plain_text_is_a_shape_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "Once upon a time."}\n{"text": "The end.", "source": "book"}\n')
    report = check(path)
    assert (report.ok, report.format, report.rows, report.longest_row) == (True, "text", 2, 17)
    assert list(read_texts(path)) == ["Once upon a time.", "The end."]
    with pytest.raises(RowError, match="plain text belongs to pretrain"):
        list(read(path))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": " \n"}, "is empty"),
        ({"text": 5}, "must be a string"),
        ({"text": "a", "prompt": "b"}, "mixed shapes: this row is prompt"),
        ({"title": "a"}, "is missing"),
    ],
)
def test_a_row_without_a_text_is_named(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "Once."}\n' + json.dumps(row) + "\n")
    report = check(path)
    assert (report.bad_rows, report.problems[0].line) == (1, 2)
    assert words in report.problems[0].message


def test_texts_are_read_from_texts_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "7", "completion": "seven"}\n')
    with pytest.raises(RowError, match="this row is prompt_completion, and plain text is needed"):
        list(read_texts(path))
