"""Rows that are held out: which, how many, and that nobody learns them."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.errors import Code, RunError
from tests.workers.context import RecordingContext
from tests.workers.test_sft import SftSpec
from workers.loading.held_out import SPLIT, data_files, read_data


def rows(path: Path, count: int, **more: Any) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"{n}", "completion": f"{n}!", **more}) + "\n" for n in range(count)))
    return path


def spec(seed: int = 42, **dataset: Any) -> SftSpec:
    return SftSpec.model_validate(
        {
            "model": {"model_name_or_path": "m"},
            "dataset": {"file": "file-1", **dataset},
            "training": {"seed": seed},
        }
    )


def context(root: Path, data: Path, **more: Path) -> RecordingContext:
    return RecordingContext(root, {"dataset.file": data, **more})


def asked(path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines() if line]


@pytest.mark.parametrize(("count", "held"), [(319, 0), (320, 16), (400, 20), (1280, 64), (5000, 64)])
def test_without_being_asked_five_percent_of_large_files(count: int, held: int, tmp_path: Path) -> None:
    ctx = context(tmp_path, rows(tmp_path / "d.jsonl", count))
    learnt, *more = data_files(spec(), ctx)
    assert learnt.field == "dataset.file"
    assert ctx.resolutions == {SPLIT: min(0.05, 64 / count) if held else 0.0}
    assert [len(asked(file.path)) for file in more] == ([held] if held else [])
    assert len(asked(learnt.path)) == count - held
    if more:
        assert more[0].field == SPLIT
        assert set(asked(more[0].path)).isdisjoint(asked(learnt.path))


@pytest.mark.parametrize(("count", "share", "held"), [(100, 0.1, 10), (3, 0.05, 1), (2, 0.9, 1), (1000, 0.2, 200)])
def test_a_share_that_is_asked_for(count: int, share: float, held: int, tmp_path: Path) -> None:
    ctx = context(tmp_path, rows(tmp_path / "d.jsonl", count))
    learnt, other = data_files(spec(eval_split=share), ctx)
    assert (len(asked(learnt.path)), len(asked(other.path))) == (count - held, held)
    assert ctx.codes() == ["rows_held_out"]


def test_one_row_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        data_files(spec(eval_split=0.5), context(tmp_path, rows(tmp_path / "d.jsonl", 1)))
    assert (caught.value.code, caught.value.param) == (Code.BAD_DATA, SPLIT)


def test_zero_and_a_file_of_ones_own_leave_the_data_whole(tmp_path: Path) -> None:
    data, own = rows(tmp_path / "d.jsonl", 1000), rows(tmp_path / "own.jsonl", 5)
    assert data_files(spec(eval_split=0.0), context(tmp_path, data)) == [("dataset.file", data)]
    ctx = context(tmp_path, data, **{"dataset.eval_file": own})
    assert data_files(spec(eval_file="file-2"), ctx) == [("dataset.file", data), ("dataset.eval_file", own)]


def test_the_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    data = rows(tmp_path / "d.jsonl", 400)
    once, again, other = (
        [file.path.read_bytes() for file in data_files(spec(seed), context(tmp_path / name, data))]
        for name, seed in (("once", 1), ("again", 1), ("other", 2))
    )
    assert once == again != other


def test_rows_keep_their_numbers(tmp_path: Path) -> None:
    data = rows(tmp_path / "d.jsonl", 50)
    learnt, held = data_files(spec(eval_split=0.2), context(tmp_path, data))
    lines = learnt.path.read_text().split("\n")
    for number, line in enumerate(data.read_text().split("\n")):
        assert lines[number] in ("", line)
    assert sum(not line for line in lines) == 11  # ten held out, and behind the last line


def test_an_array_is_split_too(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"prompt": str(n), "completion": "x"} for n in range(40)], indent=1))
    learnt, held = data_files(spec(eval_split=0.1), context(tmp_path, path))
    assert sorted(map(int, asked(learnt.path) + asked(held.path))) == list(range(40))


def test_rows_that_are_learnt_as_well_are_not_measured(tmp_path: Path) -> None:
    data = rows(tmp_path / "d.jsonl", 100)
    data.write_text(data.read_text() * 2)  # each row twice
    ctx = context(tmp_path, data)
    files = data_files(spec(eval_split=0.1), ctx)
    learnt = asked(files[0].path)
    for file in files[1:]:
        assert set(asked(file.path)).isdisjoint(learnt)
    (event,) = ctx.events
    assert event["held_out"] + event["repeated"] == 20
    assert event["repeated"] > 10


def test_both_kinds_of_judged_rows_are_held_out(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": str(n), "completion": "x", "label": n % 100 != 0}) + "\n" for n in range(400))
    )
    _, held = data_files(spec(), context(tmp_path, path))
    labels = [json.loads(line)["label"] for line in held.path.read_text().splitlines()]
    assert labels.count(False) == 1
    assert len(labels) == 21


def test_a_file_with_a_fault_is_left_to_whoever_reads_it(tmp_path: Path) -> None:
    data = rows(tmp_path / "d.jsonl", 400)
    data.write_text(data.read_text() + "{\n")
    assert data_files(spec(eval_split=0.1), context(tmp_path, data)) == [("dataset.file", data)]


def test_rows_that_nobody_asked_for_fail_no_run(tmp_path: Path) -> None:
    ctx = context(tmp_path, rows(tmp_path / "d.jsonl", 400))

    def read(path: Path, field: str) -> str:
        if field == SPLIT:
            raise RunError(Code.BAD_DATA, "all of them are too long")
        return field

    assert read_data(spec(), ctx, read) == ("dataset.file", None)
    assert "held_out_unusable" in ctx.codes()
    with pytest.raises(RunError, match="too long"):
        read_data(spec(eval_split=0.05), ctx, read)


def test_what_was_prepared_is_taken_as_it_is(tmp_path: Path) -> None:
    data = rows(tmp_path / "d.jsonl", 400)
    ctx = context(tmp_path, data)
    ctx.prepared_dir = tmp_path / "prepared"
    ctx.prepared_dir.mkdir()
    first = data_files(spec(), ctx)
    assert [file.path.parent.parent for file in first] == [ctx.prepared_dir] * 2
    data.write_text("")
    assert data_files(spec(), ctx) == first
