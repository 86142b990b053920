"""The health of a run: gradients that are no numbers, a loss that stays, weights that nobody trains."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import Code, RunError
from tests.workers.context import RecordingContext
from tests.workers.test_sft import ALL_LINEAR, context, sha256, spec
from workers.loading.health import Health, improved, report_trainable
from workers.recipes import sft as recipe
from workers.recipes.sft import run


def poisoned(monkeypatch: Any, bad: Callable[[int], bool]) -> None:
    """The gradient of the steps that ``bad`` names holds one number that is none; the loss stays finite."""
    original = recipe.run_trainer

    def patched(trainer: Any, *rest: Any) -> None:
        weight = next(weight for weight in trainer.model.parameters() if weight.requires_grad)

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            spoilt = gradient.clone()
            spoilt.view(-1)[0] = math.nan
            return spoilt if bad(trainer.state.global_step + 1) else gradient

        weight.register_hook(spoil)
        original(trainer, *rest)

    monkeypatch.setattr(recipe, "run_trainer", patched)


def test_one_bad_gradient_changes_no_weight_and_the_run_goes_on(
    tmp_path: Path, tiny: Path, numbers: Path, monkeypatch: Any
) -> None:
    poisoned(monkeypatch, lambda step: step == 3)
    ctx = context(tmp_path, tiny, numbers)
    run(spec(model=ALL_LINEAR, max_steps=6, save_steps=1), ctx)
    assert all(math.isfinite(loss) for loss in ctx.losses)
    assert [step for _, step in ctx.checkpoints] == [1, 2, 4, 5, 6]
    assert [event["step"] for event in ctx.events if event["code"] == "non_finite_loss"] == [3]
    check = ctx.checks["finite"]
    assert (check["status"], check["bad_steps"], check["last_bad_step"]) == ("warning", 0, 3)


def test_three_bad_gradients_in_a_row_end_the_run_though_the_loss_is_finite(
    tmp_path: Path, tiny: Path, numbers: Path, monkeypatch: Any
) -> None:
    poisoned(monkeypatch, lambda step: step >= 3)
    ctx = context(tmp_path, tiny, numbers)
    with pytest.raises(RunError, match="gradient norm is nan") as caught:
        run(spec(model=ALL_LINEAR, save_steps=1), ctx)
    assert (caught.value.code, ctx.outputs) == (Code.NON_FINITE_LOSS, [])
    assert [step for _, step in ctx.checkpoints] == [1, 2], "the last good one stays the last"
    assert (ctx.checks["finite"]["status"], ctx.checks["finite"]["bad_steps"]) == ("failed", 3)


def test_two_bad_steps_and_a_good_one_begin_the_count_anew(tmp_path: Path) -> None:
    ctx = RecordingContext(tmp_path)
    health = Health(ctx)
    for step, loss in enumerate([math.inf, math.nan, 1.0, math.nan, math.nan, 2.0], 1):
        health.step(step, loss, 1.0)
    assert health.bad_steps == 0
    assert ctx.codes() == ["non_finite_loss"] * 2


def test_a_gradient_that_is_not_known_is_not_bad(tmp_path: Path) -> None:
    health = Health(RecordingContext(tmp_path))
    for step in range(5):
        health.step(step, 1.0, None)
    assert health.bad_steps == 0


@pytest.mark.parametrize(
    ("values", "rises", "improves"),
    [
        ([5, 4, 3, 2, 1], False, True),
        ([1, 2, 3, 4, 5], False, False),
        ([1, 2, 3, 4, 5], True, True),
        ([2, 9, 9, 9, 2], False, False),
        ([5, 4, 3, 2], False, None),
    ],
)
def test_the_trend_compares_the_ends(values: list[float], rises: bool, improves: bool | None) -> None:
    assert improved(values, rises=rises) is improves


def test_a_loss_that_does_not_fall_is_told_at_the_end(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    ctx = context(tmp_path, tiny, numbers)
    run(spec(model={"use_peft": False}, max_steps=10, learning_rate=1.0), ctx)
    assert "loss_not_falling" in ctx.codes()
    assert ctx.checks["loss"]["status"] == "warning"
    assert ctx.checks["loss"]["last"] >= ctx.checks["loss"]["first"]


def test_a_model_that_nobody_trains_is_refused_before_training(
    tmp_path: Path, tiny: Path, numbers: Path, monkeypatch: Any
) -> None:
    original = recipe.load_model

    def frozen(*args: Any) -> Any:
        model, compute = original(*args)
        return model.requires_grad_(False), compute

    monkeypatch.setattr(recipe, "load_model", frozen)
    ctx = context(tmp_path, tiny, numbers)
    with pytest.raises(RunError, match="no parameter") as caught:
        run(spec(), ctx)
    assert (caught.value.code, caught.value.param) == (Code.BAD_SPEC, "model.peft_config")
    assert (ctx.steps, "training" in ctx.phases) == ([], False)
    assert ctx.checks["trainable"]["status"] == "failed"


@pytest.mark.parametrize(("adapter", "width", "status"), [(True, 1, "ok"), (True, 50, "warning"), (False, 50, "ok")])
def test_an_adapter_that_trains_more_than_a_tenth_is_warned_of(
    adapter: bool, width: int, status: str, tmp_path: Path
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, width, bias=False))
    model[0].requires_grad_(False)
    ctx = RecordingContext(tmp_path)
    report_trainable(model, ctx, adapter=adapter)
    assert ctx.checks["trainable"]["status"] == status
    assert ("large_trainable_share" in ctx.codes()) == (status == "warning")


def test_a_bad_gradient_does_not_break_the_likeness_of_a_resumed_run(
    tmp_path: Path, tiny: Path, numbers: Path, monkeypatch: Any
) -> None:
    poisoned(monkeypatch, lambda step: step == 4)
    whole = context(tmp_path / "whole", tiny, numbers)
    run(spec(model=ALL_LINEAR, max_steps=6, save_steps=3), whole)
    resumed = context(tmp_path / "resumed", tiny, numbers)
    resumed.resume_from = whole.checkpoints[0][0]
    run(spec(model=ALL_LINEAR, max_steps=6, save_steps=3), resumed)
    name = "adapter_model.safetensors"
    assert sha256(resumed.folder / name) == sha256(whole.folder / name)
