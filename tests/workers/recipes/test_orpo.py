"""ORPO: the odds of good answers rise on pairs that it never saw, the loss is the paper's, a resume is exact."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from app.catalog import Interrupted
from app.errors import Code, RunError
from tests.workers.context import RecordingContext
from tests.workers.recipes.test_reward import pairs
from workers.loading import load_tokenizer, stop_tokens
from workers.loading.odds import log_odds
from workers.loading.preferences import load_preferences
from workers.recipes.orpo import OrpoSpec, prepare, run

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:bitsandbytes",
    "ignore:.*_check_is_size will be removed:FutureWarning",
)
PEFT = {"peft_config": {"r": 8, "target_modules": "all-linear", "lora_dropout": 0.0}}
PISSA = {"peft_config": {"r": 4, "init_lora_weights": "pissa_niter_2"}}


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs(tmp_path_factory.mktemp("orpo") / "train.jsonl", range(100))


@pytest.fixture(scope="module")
def eval_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs(tmp_path_factory.mktemp("orpo") / "eval.jsonl", range(100, 130))


def spec(model: dict[str, Any] | None = None, *, beta: float = 0.1, **training: Any) -> OrpoSpec:
    return OrpoSpec.model_validate(
        {
            "model": {"model_name_or_path": "artifact:art-tiny", **(model or PEFT)},
            "dataset": {"file": "file-1", "eval_file": "file-2"},
            "orpo": {"beta": beta},
            "training": {"max_steps": 10, "learning_rate": 5e-3, **training},
        }
    )


def context(root: Path, base: Path, train: Path, held_out: Path) -> RecordingContext:
    inputs = {"model.model_name_or_path": base, "dataset.file": train, "dataset.eval_file": held_out}
    return RecordingContext(root, inputs, {"model.model_name_or_path": {"name": "tiny"}})


@pytest.mark.parametrize(
    "model", [PEFT, {**PEFT, "quantization_config": {}}, {"use_peft": False}], ids=["lora", "qlora", "full"]
)
def test_the_odds_of_good_answers_rise_on_pairs_that_it_never_saw(
    model: dict[str, Any], tmp_path: Path, tiny: Path, train_file: Path, eval_file: Path
) -> None:
    ctx = context(tmp_path, tiny, train_file, eval_file)
    run(spec(model, beta=1.0, max_steps=25, learning_rate=2e-3 if "use_peft" in model else 1e-2), ctx)
    found = ctx.results
    assert found["eval_log_odds"] > found["eval_log_odds_base"] + 0.3
    assert found["eval_loss"] < found["eval_loss_base"]
    assert found["eval_accuracy"] > 0.9
    assert ctx.outputs[0][2]["learning"]["verdict"] == "learnt"
    assert ctx.outputs[0][0] == ("model" if "use_peft" in model else "adapter")
    names = {name for _, values in ctx.logged for name in values}
    assert {"rewards/margins", "rewards/accuracies", "log_odds_chosen", "nll_loss", "loss"} <= names


def test_the_loss_is_that_of_the_paper(tmp_path: Path, tiny: Path, train_file: Path, eval_file: Path) -> None:
    """NLL of the good row − β · log σ(log odds ratio), worked out by hand over the first batch."""
    four = tmp_path / "four.jsonl"
    four.write_text("".join(train_file.read_text().splitlines(keepends=True)[:4]))
    ctx = context(tmp_path, tiny, four, eval_file)
    run(spec(max_steps=1, per_device_train_batch_size=4), ctx)
    tokenizer, model = load_tokenizer(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    rows = load_preferences(
        four, tokenizer, stops=stop_tokens(tokenizer, tiny), max_length=512, ctx=ctx, field="dataset.file"
    )

    def mean_logp(prompt: list[int], answer: list[int], *, whole: bool = False) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            each = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
        return each if whole else each[len(prompt) - 1 :].mean()

    nll = -torch.cat([mean_logp(row["prompt_ids"], row["chosen_ids"], whole=True) for row in rows]).mean()
    good, bad = (
        torch.stack([mean_logp(row["prompt_ids"], row[f"{name}_ids"]) for row in rows])
        for name in ("chosen", "rejected")
    )
    odds = good - bad - (torch.log1p(-good.exp()) - torch.log1p(-bad.exp()))
    expected = nll - 0.1 * torch.nn.functional.logsigmoid(odds).mean()
    assert ctx.results["first_loss"] == pytest.approx(float(expected), rel=1e-4)
    assert ctx.results["first_log_odds"] == pytest.approx(float(odds.mean()), rel=1e-3)


def test_odds_of_a_half_are_even() -> None:
    assert log_odds(math.log(0.5)) == pytest.approx(0)
    assert log_odds(math.log(0.8)) == pytest.approx(math.log(4))
    assert math.isfinite(log_odds(0.0))


@pytest.mark.parametrize("model", [PEFT, PISSA, {"use_peft": False}], ids=["lora", "pissa", "full"])
def test_a_resumed_run_ends_with_the_same_bytes(
    model: dict[str, Any], tmp_path: Path, tiny: Path, train_file: Path, eval_file: Path
) -> None:
    the_spec = spec(model, max_steps=6, learning_rate=1e-3)
    whole = context(tmp_path / "whole", tiny, train_file, eval_file)
    run(the_spec, whole)
    first = context(tmp_path / "first", tiny, train_file, eval_file)
    first.stop_after = 3
    with pytest.raises(Interrupted):
        run(the_spec, first)
    second = context(tmp_path / "second", tiny, train_file, eval_file)
    second.resume_from = first.checkpoints[-1][0]
    run(the_spec, second)
    (name,) = (path.name for path in whole.folder.glob("*.safetensors"))
    assert (second.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert {path.name for path in second.folder.iterdir()} == {path.name for path in whole.folder.iterdir()}


def test_the_best_evaluation_can_be_by_its_odds(tmp_path: Path, tiny: Path, train_file: Path, eval_file: Path) -> None:
    ctx = context(tmp_path, tiny, train_file, eval_file)
    stopping = {"metric": "log_odds_chosen", "patience": 1, "min_delta": 100.0}
    run(spec(max_steps=20, eval_steps=2, early_stopping=stopping), ctx)
    assert ctx.results["steps"] == 4
    assert "early_stopped" in ctx.codes() or "stopped_early" in ctx.codes()


def test_rows_are_made_ready_beforehand(tmp_path: Path, tiny: Path, train_file: Path, eval_file: Path) -> None:
    ctx = context(tmp_path, tiny, train_file, eval_file)
    ctx.prepared_dir = tmp_path / "prepared"
    ctx.prepared_dir.mkdir()
    prepare(spec(), ctx)
    made = {path.name: path.read_bytes() for path in ctx.prepared_dir.glob("*.arrow")}
    assert set(made) == {"dataset.file.arrow", "dataset.eval_file.arrow"}
    run(spec(max_steps=1), ctx)
    assert {path.name: path.read_bytes() for path in ctx.prepared_dir.glob("*.arrow")} == made


def test_rows_that_are_no_preferences_are_refused(tmp_path: Path, tiny: Path, numbers: Path, eval_file: Path) -> None:
    with pytest.raises(RunError, match="line 1: chosen: is missing") as caught:
        run(spec(), context(tmp_path, tiny, numbers, eval_file))
    assert (caught.value.code, caught.value.param) == (Code.BAD_DATA, "dataset.file")
