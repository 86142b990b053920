"""DPO: margins rise on pairs that it never saw, the loss begins at log 2, a resumed run ends with the same bytes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from app.catalog import Interrupted
from app.errors import Code, RunError
from app.files.rows import Example
from tests.workers.conftest import conversation, make_tokenizer
from tests.workers.context import RecordingContext
from tests.workers.recipes.test_reward import pairs
from workers.loading.preferences import encode_preference
from workers.recipes.dpo import DpoSpec, run

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:bitsandbytes",
    "ignore:.*_check_is_size will be removed:FutureWarning",
)
PEFT = {"peft_config": {"r": 8, "target_modules": "all-linear", "lora_dropout": 0.0}}


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs(tmp_path_factory.mktemp("dpo") / "train.jsonl", range(100))


@pytest.fixture(scope="module")
def eval_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs(tmp_path_factory.mktemp("dpo") / "eval.jsonl", range(100, 130))


def spec(model: dict[str, Any] | None = None, **training: Any) -> DpoSpec:
    return DpoSpec.model_validate(
        {
            "model": {"model_name_or_path": "artifact:art-tiny", **(model or PEFT)},
            "dataset": {"file": "file-1", "eval_file": "file-2"},
            "training": {"max_steps": 10, "learning_rate": 5e-3, **training},
        }
    )


def context(root: Path, base: Path, train: Path, held_out: Path) -> RecordingContext:
    inputs = {"model.model_name_or_path": base, "dataset.file": train, "dataset.eval_file": held_out}
    return RecordingContext(root, inputs, {"model.model_name_or_path": {"name": "tiny"}})


@pytest.mark.parametrize(
    "model", [PEFT, {**PEFT, "quantization_config": {}}, {"use_peft": False}], ids=["lora", "qlora", "full"]
)
def test_margins_rise_on_pairs_that_it_never_saw(
    model: dict[str, Any], tmp_path: Path, tiny: Path, train_file: Path, eval_file: Path
) -> None:
    ctx = context(tmp_path, tiny, train_file, eval_file)
    run(spec(model, learning_rate=1e-3 if "use_peft" in model else 5e-3), ctx)
    assert ctx.results["first_loss"] == pytest.approx(math.log(2), abs=1e-3), "policy and reference begin as one"
    assert ctx.results["first_margin"] == pytest.approx(0, abs=1e-3)
    assert ctx.results["eval_margin"] > 0.1
    assert ctx.results["eval_accuracy"] > 0.9
    assert ctx.outputs[0][0] == ("model" if "use_peft" in model else "adapter")
    names = {name for _, values in ctx.logged for name in values}
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen", "loss"} <= names


@pytest.mark.parametrize("model", [PEFT, {"use_peft": False}], ids=["lora", "full"])
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


def test_prompt_and_answers_meet_where_a_server_begins_to_write(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    *prompt, answer = conversation(42)
    wrong = {"role": "assistant", "content": "nine"}
    row = encode_preference(Example(prompt, [answer], [wrong]), tokenizer, {tokenizer.eos_token_id})
    assert tokenizer.decode(row.prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(row.chosen) == "four two<|im_end|>"
    assert tokenizer.decode(row.rejected) == "nine<|im_end|>"


def test_without_a_template_the_answer_ends_the_text(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, template=None)
    ask = [{"role": "user", "content": "42 is "}]
    row = encode_preference(
        Example(ask, [{"role": "assistant", "content": "four two"}], [{"role": "assistant", "content": "nine"}]),
        tokenizer,
        {tokenizer.eos_token_id},
    )
    assert tokenizer.decode(row.prompt) == "42 is "
    assert tokenizer.decode(row.chosen) == "four two<|im_end|>"


def test_rows_that_are_no_preferences_are_refused(tmp_path: Path, tiny: Path, numbers: Path, eval_file: Path) -> None:
    with pytest.raises(RunError, match="line 1: chosen: is missing") as caught:
        run(spec(), context(tmp_path, tiny, numbers, eval_file))
    assert (caught.value.code, caught.value.param) == (Code.BAD_DATA, "dataset.file")


def test_pairs_that_are_too_long_are_left_out_and_counted(tmp_path: Path, tiny: Path, eval_file: Path) -> None:
    path = pairs(tmp_path / "train.jsonl", range(20))
    path.write_text(path.read_text() + json.dumps({"prompt": "7 " * 400, "chosen": "a", "rejected": "b"}) + "\n")
    ctx = context(tmp_path / "run", tiny, path, eval_file)
    run(spec(max_steps=1, max_length=120), ctx)
    assert next(event for event in ctx.events if event["code"] == "rows_dropped")["dropped"] == 1
