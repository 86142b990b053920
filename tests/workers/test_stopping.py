"""Runs that end before their last step: by what the evaluations say, by the clock; and the best checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from app.catalog import Catalog, Interrupted
from app.storage import Storage
from tests.workers.context import RecordingContext
from tests.workers.test_sft import ALL_LINEAR, context, conversation, sha256
from workers.checkpoints import committed, rotate
from workers.context import JobContext
from workers.loading.stopping import Stopping
from workers.recipes.sft import SftSpec, run

NAME = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "held.jsonl"
    rows = [{"messages": conversation(number)} for number in range(500, 516)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def spec(model: dict[str, Any] = ALL_LINEAR, **training: Any) -> SftSpec:
    return SftSpec.model_validate(
        {
            "model": {"model_name_or_path": "artifact:art-tiny", **model},
            "dataset": {"file": "file-1", "eval_file": "file-2"},
            "training": {"max_steps": 40, "learning_rate": 1e-2, **training},
        }
    )


# A learning rate at which the held-out loss falls, and then jumps about.
WILD = {"learning_rate": 0.2, "eval_steps": 2, "early_stopping": {"patience": 3}}


def world(root: Path, tiny: Path, numbers: Path, held: Path) -> RecordingContext:
    return context(root, tiny, numbers, **{"dataset.eval_file": held})


def evaluations(ctx: RecordingContext, metric: str = "eval_loss") -> dict[int, float]:
    return {step: values[metric] for step, values in ctx.logged if metric in values}


# --- counting ---------------------------------------------------------------------------------------------------------


def counted(ctx: RecordingContext, losses: list[float], **rule: Any) -> Stopping:
    stopping = Stopping(spec(eval_steps=1, early_stopping=rule), ctx)
    for step, loss in enumerate(losses, 1):
        if stopping.reason is None:
            stopping.evaluated(step, {"eval_loss": loss})
    return stopping


@pytest.mark.parametrize(
    ("losses", "rule", "stops", "best"),
    [
        ([3, 2, 1, 1, 1], {"patience": 2}, True, 3),
        ([3, 2, 1, 1, 0.5], {"patience": 2}, False, 5),
        ([3, 2.95, 2.9, 2.85], {"patience": 2, "min_delta": 0.1}, True, 3),  # 2.9 is better, and too little so
        ([3, 2.95, 2.85, 2.8], {"patience": 2, "min_delta": 0.1}, False, 4),
        ([1, 2], {"patience": 1}, True, 1),
    ],
)
def test_patience_counts_evaluations_without_enough_of_a_gain(
    losses: list[float], rule: dict[str, Any], stops: bool, best: int, tmp_path: Path
) -> None:
    ctx = RecordingContext(tmp_path)
    stopping = counted(ctx, losses, **rule)
    assert (stopping.reason == "early_stopping") == stops
    assert stopping.best is not None
    assert stopping.best.step == best
    assert ctx.codes() == (["stopped_early"] if stops else [])


def test_some_metrics_are_better_when_they_are_higher(tmp_path: Path) -> None:
    rule = {"metric": "mean_token_accuracy", "patience": 2}
    stopping = Stopping(spec(eval_steps=1, early_stopping=rule), RecordingContext(tmp_path))
    for step, accuracy in enumerate([0.1, 0.5, 0.4], 1):
        stopping.evaluated(step, {"eval_mean_token_accuracy": accuracy, "eval_loss": 1.0})
    assert stopping.best is not None
    assert (stopping.best.step, stopping.waited) == (2, 1)
    assert stopping.score({"eval_mean_token_accuracy": 0.4}) == -0.4


def test_an_evaluation_without_the_metric_is_told_and_not_counted(tmp_path: Path) -> None:
    ctx = RecordingContext(tmp_path)
    stopping = Stopping(spec(eval_steps=1, early_stopping={"patience": 1}), ctx)
    assert not stopping.evaluated(1, {"eval_accuracy": 1.0})
    assert (stopping.reason, stopping.waited, ctx.codes()) == (None, 0, ["metric_missing"])


def test_the_state_finds_the_best_checkpoint_wherever_both_are_moved(tmp_path: Path) -> None:
    ctx = RecordingContext(tmp_path)
    stopping = counted(ctx, [2, 1, 3], patience=5)
    here = tmp_path / "here"
    for step in (2, 3):
        (here / f"a{step}" / "ckpt" / f"checkpoint-{step}").mkdir(parents=True)
        stopping.saved(step, here / f"a{step}" / "ckpt" / f"checkpoint-{step}")
    state = json.loads(json.dumps(stopping.state(here / "a3" / "ckpt" / "checkpoint-3")))
    there = tmp_path / "there"
    here.rename(there)
    again = Stopping(spec(eval_steps=1, early_stopping={"patience": 5}), ctx)
    again.restore(state, there / "a3" / "ckpt" / "checkpoint-3")
    assert again.best is not None
    assert again.best.folder == there / "a2" / "ckpt" / "checkpoint-2"
    assert (again.best.step, again.best.value, again.waited) == (2, 1, 1)


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [ALL_LINEAR, {"use_peft": False}], ids=["lora", "full"])
def test_a_run_stops_early_and_keeps_its_best_weights(
    model: dict[str, Any], tmp_path: Path, tiny: Path, numbers: Path, held: Path
) -> None:
    ctx = world(tmp_path, tiny, numbers, held)
    run(spec(model, **WILD), ctx)
    found = evaluations(ctx)
    best = min(found, key=lambda step: found[step])
    assert ctx.results["steps"] == max(found) < 40
    assert best == max(found) - 2 * 3, "three evaluations without a gain"
    assert next(event for event in ctx.events if event["code"] == "stopped_early")["reason"] == "early_stopping"
    folder = next(folder for folder, step in ctx.checkpoints if step == best)
    (name,) = (path.name for path in ctx.folder.glob("*.safetensors"))
    assert sha256(ctx.folder / name) == sha256(folder / name)
    assert ctx.results["eval_loss"] == pytest.approx(found[best], rel=0.02), "the check looks at what is kept"
    assert ctx.results["stopped_by"] == "early_stopping"


def test_a_run_may_stop_early_and_keep_its_last_weights(tmp_path: Path, tiny: Path, numbers: Path, held: Path) -> None:
    ctx = world(tmp_path, tiny, numbers, held)
    run(spec(**WILD, load_best_model_at_end=False), ctx)
    assert ctx.results["steps"] < 40
    folder, step = ctx.checkpoints[-1]
    assert step == ctx.results["steps"]
    assert sha256(ctx.folder / NAME) == sha256(folder / NAME)
    assert "best_checkpoint_loaded" not in ctx.codes()


@pytest.mark.parametrize(
    "cut", [1, pytest.param(3, marks=pytest.mark.long), 4, pytest.param(5, marks=pytest.mark.long), 7]
)
def test_early_stopping_survives_an_interruption(
    cut: int, tmp_path: Path, tiny: Path, numbers: Path, held: Path
) -> None:
    whole = world(tmp_path / "whole", tiny, numbers, held)
    run(spec(**WILD), whole)
    first = world(tmp_path / "first", tiny, numbers, held)
    first.stop_after = cut
    with pytest.raises(Interrupted):
        run(spec(**WILD), first)
    second = world(tmp_path / "second", tiny, numbers, held)
    second.resume_from = first.checkpoints[-1][0]
    run(spec(**WILD), second)
    assert evaluations(first) | evaluations(second) == evaluations(whole)
    assert second.results["steps"] == whole.results["steps"]
    assert sha256(second.folder / NAME) == sha256(whole.folder / NAME)


@pytest.mark.parametrize("settings", [{"max_steps": 5}, WILD], ids=["last step", "stopped early"])
def test_a_run_cut_off_behind_its_last_step_takes_no_further_one(
    settings: dict[str, Any], tmp_path: Path, tiny: Path, numbers: Path, held: Path
) -> None:
    whole = world(tmp_path / "whole", tiny, numbers, held)
    run(spec(**settings), whole)
    again = world(tmp_path / "again", tiny, numbers, held)
    again.resume_from = whole.checkpoints[-1][0]
    run(spec(**settings), again)
    assert again.steps == []
    assert again.results["steps"] == whole.results["steps"]
    assert again.results["final_loss"] == whole.results["final_loss"]
    assert again.results["eval_loss"] == whole.results["eval_loss"]
    assert sha256(again.folder / NAME) == sha256(whole.folder / NAME)


def test_evaluations_at_the_end_of_an_epoch_belong_to_its_checkpoint(
    tmp_path: Path, tiny: Path, numbers: Path, held: Path
) -> None:
    """200 rows in batches of 50 are 4 steps an epoch; a checkpoint lies on each of its ends."""
    settings = {
        "per_device_train_batch_size": 50,
        "max_steps": 10,
        "eval_strategy": "epoch",
        "save_steps": 4,
        "early_stopping": {"patience": 9},
    }
    whole = world(tmp_path / "whole", tiny, numbers, held)
    run(spec(**settings), whole)
    assert list(evaluations(whole)) == [4, 8, 10]
    assert [score is not None and score < 99 for score in whole.scores] == [True] * 3
    second = world(tmp_path / "second", tiny, numbers, held)
    second.resume_from = whole.checkpoints[0][0]
    run(spec(**settings), second)
    assert list(evaluations(second)) == [8, 10]
    assert sha256(second.folder / NAME) == sha256(whole.folder / NAME)


def test_the_time_budget_ends_a_run_well(tmp_path: Path, tiny: Path, numbers: Path, held: Path) -> None:
    ctx = world(tmp_path, tiny, numbers, held)
    settings = {"max_seconds": 100.0, "eval_steps": 10}
    ctx.spent = 99.0
    original = ctx.progress

    def progress(step: int, total_steps: int, **values: float | None) -> None:
        original(step, total_steps, **values)
        ctx.spent = 100.5 if step >= 7 else ctx.spent
        assert values["eta_seconds"] <= 1.0

    ctx.progress = progress  # type: ignore[method-assign]
    run(spec(**settings), ctx)
    assert (ctx.results["steps"], ctx.results["stopped_by"]) == (7, "max_seconds")
    assert [step for _, step in ctx.checkpoints] == [7]
    assert list(evaluations(ctx)) == [7], "what it reached is measured"
    assert next(event for event in ctx.events if event["code"] == "stopped_early")["reason"] == "max_seconds"
    again = world(tmp_path / "again", tiny, numbers, held)
    again.resume_from, again.spent = ctx.checkpoints[-1][0], 200.0
    run(spec(**settings), again)
    assert (again.steps, again.results["steps"], again.results["stopped_by"]) == ([], 7, "max_seconds")
    assert sha256(again.folder / NAME) == sha256(ctx.folder / NAME)


def test_best_weights_that_are_gone_are_told(tmp_path: Path, tiny: Path, numbers: Path, held: Path) -> None:
    first = world(tmp_path / "first", tiny, numbers, held)
    run(spec(**WILD), first)
    found = evaluations(first)
    best = min(found, key=lambda step: found[step])
    shutil.rmtree(next(folder for folder, step in first.checkpoints if step == best))
    again = world(tmp_path / "again", tiny, numbers, held)
    again.resume_from = first.checkpoints[-1][0]
    run(spec(**WILD), again)
    assert "best_checkpoint_missing" in again.codes()
    assert sha256(again.folder / NAME) == sha256(first.checkpoints[-1][0] / NAME)


def test_the_best_checkpoint_outlives_the_rotation(tmp_path: Path, tiny: Path, numbers: Path, held: Path) -> None:
    """Of a full fine-tune two checkpoints stay, and the best one besides; by the metric that was asked for."""
    folder = tmp_path / "a1"
    folder.mkdir()
    attempt = {
        "job_id": "job-1",
        "inputs": {
            "model.model_name_or_path": {"path": str(tiny), "name": "tiny"},
            "dataset.file": {"path": str(numbers)},
            "dataset.eval_file": {"path": str(held)},
        },
    }
    ctx = JobContext(folder, attempt, Catalog())
    rule = {"metric": "eval_mean_token_accuracy", "patience": 3}
    run(spec({"use_peft": False}, **{**WILD, "early_stopping": rule, "save_steps": 1}), ctx)
    ctx.settle()
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    found = {line["step"]: line["eval_mean_token_accuracy"] for line in lines if "eval_mean_token_accuracy" in line}
    best = max(found, key=lambda step: found[step])
    left = {item.step: item for item in committed(tmp_path, 1)}
    assert left[best].score == -found[best]
    assert best not in sorted(left)[-2:]
    assert len(left) == 3
    rotate(tmp_path, 1, 2)
    assert best in {item.step for item in committed(tmp_path, 1)}
    assert Storage.checkpoint_faults(left[best].folder) == []
