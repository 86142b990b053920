"""Reward models: they learn what was preferred, judge the same when loaded again, and resume exactly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.catalog import Interrupted
from app.errors import Code, RunError
from tests.workers.conftest import conversation
from tests.workers.context import RecordingContext
from workers.loading import device_and_dtype, load_tokenizer
from workers.loading.reward_model import load_scorer, render, scores
from workers.recipes.reward import RewardSpec, run

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:bitsandbytes",
    "ignore:.*_check_is_size will be removed:FutureWarning",
)
PEFT = {"peft_config": {"r": 8, "target_modules": "all-linear", "lora_dropout": 0.0}}


def pairs(path: Path, numbers: range) -> Path:
    """The right words are chosen; rejected is an answer that does not answer."""
    rows = []
    for number in numbers:
        *prompt, answer = conversation(number)
        rows.append({"messages": prompt, "chosen": answer, "rejected": {"role": "assistant", "content": "I pass."}})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs(tmp_path_factory.mktemp("pairs") / "train.jsonl", range(100))


@pytest.fixture(scope="module")
def eval_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs(tmp_path_factory.mktemp("pairs") / "eval.jsonl", range(100, 140))


def spec(model: dict[str, Any] | None = None, **training: Any) -> RewardSpec:
    return RewardSpec.model_validate(
        {
            "model": {"model_name_or_path": "artifact:art-tiny", **(model or PEFT)},
            "dataset": {"file": "file-1", "eval_file": "file-2"},
            "training": {"max_steps": 12, "learning_rate": 5e-3, **training},
        }
    )


def context(root: Path, base: Path, train: Path, held_out: Path) -> RecordingContext:
    inputs = {"model.model_name_or_path": base, "dataset.file": train, "dataset.eval_file": held_out}
    return RecordingContext(root, inputs, {"model.model_name_or_path": {"name": "tiny"}})


@pytest.mark.parametrize(
    "model",
    [PEFT, {**PEFT, "quantization_config": {}}, {"use_peft": False}],
    ids=["lora", "qlora", "full"],
)
def test_it_tells_better_from_worse_on_pairs_that_it_never_saw(
    model: dict[str, Any], tmp_path: Path, tiny: Path, train_file: Path, eval_file: Path
) -> None:
    ctx = context(tmp_path, tiny, train_file, eval_file)
    run(spec(model, learning_rate=2e-3 if "use_peft" in model else 5e-3), ctx)
    assert ctx.results["eval_accuracy"] > 0.9
    assert ctx.results["eval_loss"] < ctx.results["eval_loss_base"]
    assert ctx.outputs[0][0] == "reward"
    names = {name for _, values in ctx.logged for name in values}
    assert {"accuracy", "margin", "mean_reward", "loss"} <= names
    assert str(tmp_path) not in "".join(path.read_text() for path in ctx.folder.glob("*.json"))


@pytest.mark.parametrize("model", [PEFT, {"use_peft": False}], ids=["lora", "full"])
def test_a_stored_reward_model_judges_as_it_did(
    model: dict[str, Any], tmp_path: Path, tiny: Path, train_file: Path, eval_file: Path
) -> None:
    ctx = context(tmp_path, tiny, train_file, eval_file)
    run(spec(model, max_steps=6), ctx)
    tokenizer = load_tokenizer(ctx.folder)
    compute = device_and_dtype(None, ctx, "dtype")
    judge = load_scorer(ctx.folder, tiny if "peft_config" in model else None, compute, tokenizer)
    assert not any(parameter.requires_grad for parameter in judge.model.parameters())
    margins = []
    for line in eval_file.read_text().splitlines():
        row = json.loads(line)
        good, bad = (
            score_one(judge.model, render([*row["messages"], row[name]], tokenizer)) for name in ("chosen", "rejected")
        )
        margins.append(good - bad)
    assert sum(margins) / len(margins) == pytest.approx(ctx.results["eval_margin"], abs=1e-4)


def score_one(model: Any, ids: list[int]) -> float:
    row = torch.tensor([ids])
    with torch.no_grad():
        return float(scores(model, row, torch.ones_like(row)))


def test_padding_on_either_side_changes_no_score(tmp_path: Path, tiny: Path, train_file: Path, eval_file: Path) -> None:
    ctx = context(tmp_path, tiny, train_file, eval_file)
    run(spec(max_steps=2), ctx)
    tokenizer = load_tokenizer(tiny)
    judge = load_scorer(ctx.folder, tiny, device_and_dtype(None, ctx, "dtype"), tokenizer).model
    ids = render(conversation(42), tokenizer)
    alone = score_one(judge, ids)
    end = tokenizer.eos_token_id  # the worst pad there is: it also ends every answer
    for row, mask in (([*ids, end, end], [*[1] * len(ids), 0, 0]), ([end, end, *ids], [0, 0, *[1] * len(ids)])):
        with torch.no_grad():
            padded = float(scores(judge, torch.tensor([row]), torch.tensor([mask])))
        assert padded == pytest.approx(alone, abs=1e-4)


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path, tiny: Path, train_file: Path, eval_file: Path) -> None:
    whole = context(tmp_path / "whole", tiny, train_file, eval_file)
    run(spec(max_steps=6), whole)
    first = context(tmp_path / "first", tiny, train_file, eval_file)
    first.stop_after = 3
    with pytest.raises(Interrupted):
        run(spec(max_steps=6), first)
    second = context(tmp_path / "second", tiny, train_file, eval_file)
    second.resume_from = first.checkpoints[-1][0]
    run(spec(max_steps=6), second)
    name = "adapter_model.safetensors"
    assert (second.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert any("score" in key for key in load_file(whole.folder / name)), "the head belongs to the adapter"


def test_pairs_that_are_too_long_are_left_out_and_counted(tmp_path: Path, tiny: Path, eval_file: Path) -> None:
    path = pairs(tmp_path / "train.jsonl", range(20))
    row = {"prompt": "7 " * 400, "chosen": "seven", "rejected": "eight"}
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    ctx = context(tmp_path / "run", tiny, path, eval_file)
    run(spec(max_steps=1, max_length=120), ctx)
    assert next(event for event in ctx.events if event["code"] == "rows_dropped")["dropped"] == 1
    with pytest.raises(RunError, match="nothing is left") as caught:
        run(spec(max_steps=1, max_length=8), context(tmp_path / "none", tiny, path, eval_file))
    assert caught.value.code == Code.BAD_DATA
    assert caught.value.param == "dataset.file"


def test_rows_without_a_rejected_answer_are_refused_with_their_line(
    tmp_path: Path, tiny: Path, numbers: Path, eval_file: Path
) -> None:
    with pytest.raises(RunError, match="line 1: chosen: is missing") as caught:
        run(spec(max_steps=1), context(tmp_path, tiny, numbers, eval_file))
    assert (caught.value.code, caught.value.param) == (Code.BAD_DATA, "dataset.file")


def test_a_reward_model_is_not_served() -> None:
    body = spec().model_dump(exclude={"then"})
    with pytest.raises(ValueError, match="judged with"):
        RewardSpec.model_validate({**body, "then": ["merge"]})
    with pytest.raises(ValueError, match="preferences"):
        RewardSpec.model_validate({**body, "dataset": {"file": "file-1", "format": "alpaca"}})
