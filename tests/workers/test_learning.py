"""The check that ends every run: what it says of runs that learn, that do not, and of those that unlearn."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from app.catalog import Interrupted
from tests.workers.conftest import conversation
from tests.workers.context import RecordingContext
from tests.workers.test_sft import ALL_LINEAR, context, sha256
from workers.loading.learning import MAX_TOKENS, MIN_ROWS, LearningCheck, held_rows, undisturbed
from workers.loading.paired import compare, t_quantile
from workers.recipes.sft import SftSpec, run


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough conversations for some to be held out without being asked for."""
    path = tmp_path_factory.mktemp("data") / "many.jsonl"
    path.write_text("".join(json.dumps({"messages": conversation(number)}) + "\n" for number in range(400)))
    return path


def spec(model: dict[str, Any] = ALL_LINEAR, dataset: dict[str, Any] | None = None, **training: Any) -> SftSpec:
    return SftSpec.model_validate(
        {
            "model": {"model_name_or_path": "artifact:art-tiny", **model},
            "dataset": {"file": "file-1", **(dataset or {})},
            "training": {"max_steps": 12, "learning_rate": 1e-2, **training},
        }
    )


# --- the interval -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(7, 2.3646), (10, 2.2281), (30, 2.0423), (255, 1.9693), (10_000, 1.9602)]
)
def test_the_quantile_is_that_of_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=2e-3)


def test_the_interval_is_worked_out_by_hand() -> None:
    base, tuned = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], [0.0, 1.5, 2.0, 3.5, 4.0, 5.5, 6.0, 7.5]
    change = compare(base, tuned, "lower")  # differences -1 and -0.5 in turns
    assert (change.base, change.tuned, change.change) == (4.5, 3.75, -0.75)
    margin = 2.3646 * math.sqrt(8 * 0.0625 / 7) / math.sqrt(8)
    assert (change.low, change.high) == (
        pytest.approx(-0.75 - margin, abs=1e-3),
        pytest.approx(-0.75 + margin, abs=1e-3),
    )
    assert change.verdict == "learnt"


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    chance = random.Random(3)
    hits = 0
    for _ in range(1000):
        base = [chance.gauss(5, 2) for _ in range(16)]
        tuned = [value - 0.3 + chance.gauss(0, 0.5) for value in base]
        change = compare(base, tuned, "lower")
        hits += change.low <= -0.3 <= change.high
    assert 930 <= hits <= 970


@pytest.mark.parametrize(
    ("shift", "noise", "better", "verdict"),
    [
        (-1.0, 0.1, "lower", "learnt"),
        (1.0, 0.1, "lower", "worse"),
        (1.0, 0.1, "higher", "learnt"),
        (-1.0, 0.1, "higher", "worse"),
        (0.0, 1.0, "lower", "no_effect"),
        (-1e-4, 0.0, "lower", "no_effect"),  # sure, and too small to matter
    ],
)
def test_the_verdict(shift: float, noise: float, better: Any, verdict: str) -> None:
    chance = random.Random(1)
    base = [chance.gauss(3, 1) for _ in range(32)]
    assert compare(base, [value + shift + chance.gauss(0, noise) for value in base], better).verdict == verdict


# --- the check --------------------------------------------------------------------------------------------------------


def checked(
    ctx: RecordingContext, measures: list[Callable[[], Any]], start: Path, **more: Any
) -> tuple[dict[str, Any], LearningCheck]:
    model = torch.nn.Linear(2, 2)
    turns = iter(measures)
    check = LearningCheck(ctx, spec(), model, start=start, device="cpu", measure=lambda: next(turns)(), **more)
    check.before()
    with torch.no_grad():
        model.weight += 1
    return check.after(), check


def rows(value: float) -> Callable[[], dict[str, list[float]]]:
    return lambda: {"loss": [value + 0.01 * row for row in range(MIN_ROWS)]}


def test_base_and_tuned_are_told_with_their_interval(tmp_path: Path) -> None:
    ctx = RecordingContext(tmp_path)
    ctx.estimate = 1.5
    learning, check = checked(ctx, [rows(2.0), rows(1.0)], tmp_path)
    assert (learning["verdict"], learning["metric"], learning["rows"]) == ("learnt", "loss", MIN_ROWS)
    found = learning["metrics"]["loss"]
    assert (found["base"], found["tuned"], found["change"]) == pytest.approx((2.035, 1.035, -1.0))
    assert learning["update"]["norm"] == pytest.approx(2.0)  # four numbers moved by one
    assert learning["memory"]["estimated_bytes"] == 1_500_000_000
    assert learning["memory"]["peak_bytes"] > 1 << 20
    assert learning["trainable"] == {"parameters": 6, "total": 6, "share": 1.0}
    assert check.numbers == pytest.approx({"eval_loss_base": 2.035, "eval_loss": 1.035})
    (event,) = [event for event in ctx.events if event["code"] == "learning_checked"]
    assert event["level"] == "info"
    assert "2.035 → 1.035" in event["message"]


def _broken() -> dict[str, list[float]]:
    raise torch.OutOfMemoryError("too much")


@pytest.mark.parametrize(
    ("measures", "reason"),
    [
        ([_broken, rows(1.0)], "too much"),
        ([rows(1.0), _broken], "too much"),
        ([rows(1.0), rows(math.nan)], "not finite"),
        ([lambda: {"loss": [1.0] * 7}, lambda: {"loss": [1.0] * 7}], "too few"),
    ],
)
def test_what_goes_wrong_with_the_check_fails_no_run(
    measures: list[Callable[[], Any]], reason: str, tmp_path: Path
) -> None:
    ctx = RecordingContext(tmp_path)
    learning, check = checked(ctx, measures, tmp_path)
    assert learning["verdict"] == "not_measured"
    assert reason in learning["reason"]
    assert check.numbers == {}
    assert "learning_not_measured" in ctx.codes()


def test_measuring_disturbs_neither_the_model_nor_what_is_drawn(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    model[0].eval()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with undisturbed(model):
        assert not model[1].training
        torch.rand(5)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model] == [False, True]


def test_few_rows_are_measured_and_always_the_same() -> None:
    assert held_rows([10] * 5, 1) == [0, 1, 2, 3, 4]
    assert len(held_rows([10] * 5000, 1)) == 256
    long = held_rows([4096] * 5000, 1)
    assert sum(4096 for _ in long) <= MAX_TOKENS
    assert len(held_rows([100_000] * 50, 1)) == MIN_ROWS
    assert held_rows([10] * 5000, 1) == held_rows([10] * 5000, 1) != held_rows([10] * 5000, 2)


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model", [ALL_LINEAR, {**ALL_LINEAR, "quantization_config": {}}, {"use_peft": False}], ids=["lora", "qlora", "full"]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes", "ignore:.*_check_is_size:FutureWarning")
def test_the_defaults_measure_what_was_learnt(model: dict[str, Any], tmp_path: Path, tiny: Path, many: Path) -> None:
    ctx = context(tmp_path, tiny, many)
    run(spec(model), ctx)
    learning = ctx.outputs[0][2]["learning"]
    assert learning["verdict"] == "learnt"
    assert learning["rows"] == 20  # 5 % of 400
    assert learning["metrics"]["loss"]["base"] == pytest.approx(math.log(400), rel=0.05)
    assert learning["metrics"]["loss"]["high"] < 0 < learning["metrics"]["accuracy"]["low"]
    assert learning["update"]["norm"] > 0
    assert 0 < learning["update"]["relative"] < 10
    assert ctx.results["eval_loss"] < ctx.results["eval_loss_base"]
    assert ctx.checks["loss"]["status"] == "ok"
    assert next(event for event in ctx.events if event["code"] == "rows_held_out")["held_out"] == 20


def test_a_run_that_moves_nothing_has_no_effect(tmp_path: Path, tiny: Path, many: Path) -> None:
    ctx = context(tmp_path, tiny, many)
    run(spec(learning_rate=1e-9, max_steps=2), ctx)
    learning = ctx.outputs[0][2]["learning"]
    assert learning["verdict"] == "no_effect"
    assert learning["update"]["norm"] < 1e-5
    assert next(event for event in ctx.events if event["code"] == "learning_checked")["level"] == "warn"


def test_a_run_that_learns_other_rows_by_heart_is_worse_on_these(tmp_path: Path, tiny: Path, many: Path) -> None:
    held = tmp_path / "held.jsonl"
    turns = [
        [{"role": "user", "content": str(row)}, {"role": "assistant", "content": "xyz " * 30}] for row in range(20)
    ]
    held.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    ctx = context(tmp_path / "run", tiny, many, **{"dataset.eval_file": held})
    run(spec({"use_peft": False}, {"eval_file": "file-2"}, learning_rate=1e-2), ctx)
    learning = ctx.outputs[0][2]["learning"]
    assert (learning["verdict"], learning["rows"]) == ("worse", 20)


def test_small_data_are_learnt_whole_and_not_measured(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    ctx = context(tmp_path, tiny, numbers)
    run(spec(max_steps=2), ctx)
    learning = ctx.outputs[0][2]["learning"]
    assert (learning["verdict"], learning["metrics"]) == ("not_measured", {})
    assert "eval_split" in learning["reason"]
    assert ctx.phases == ["staging", "loading", "training", "saving"]


def test_the_check_changes_no_byte_of_the_result(tmp_path: Path, tiny: Path, many: Path, monkeypatch: Any) -> None:
    settings = {"max_steps": 4}
    plain = context(tmp_path / "plain", tiny, many)
    run(spec(**settings), plain)
    without = context(tmp_path / "without", tiny, many)
    monkeypatch.setattr(LearningCheck, "before", lambda self: None)
    run(spec(**settings), without)
    name = "adapter_model.safetensors"
    assert sha256(plain.folder / name) == sha256(without.folder / name)


def test_an_interrupted_run_learns_what_an_uninterrupted_one_does(tmp_path: Path, tiny: Path, many: Path) -> None:
    whole = context(tmp_path / "whole", tiny, many)
    run(spec(max_steps=6), whole)
    first = context(tmp_path / "first", tiny, many)
    first.stop_after = 3
    with pytest.raises(Interrupted):
        run(spec(max_steps=6), first)
    second = context(tmp_path / "second", tiny, many)
    second.resume_from = first.checkpoints[-1][0]
    run(spec(max_steps=6), second)
    found, expected = (ctx.outputs[0][2]["learning"] for ctx in (second, whole))
    for key in ("verdict", "metrics", "update", "trainable", "first_loss", "final_loss", "train_loss"):
        assert found[key] == expected[key]
    assert [values["tokens_seen"] for _, values in first.logged + second.logged if "tokens_seen" in values] == [
        values["tokens_seen"] for _, values in whole.logged if "tokens_seen" in values
    ]
