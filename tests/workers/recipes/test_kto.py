"""KTO: good answers gain on bad ones, labels are checked, a resumed run ends with the same bytes."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.catalog import Interrupted
from app.errors import Code, RunError
from tests.workers.conftest import conversation, make_tokenizer
from tests.workers.context import RecordingContext
from workers.loading.preferences import load_judged
from workers.recipes.kto import KtoSpec, run

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:bitsandbytes",
    "ignore:.*_check_is_size will be removed:FutureWarning",
)
PEFT = {"peft_config": {"r": 8, "target_modules": "all-linear", "lora_dropout": 0.0}}


def judged(path: Path, numbers: range) -> Path:
    """The right words are good, an answer that does not answer is bad."""
    rows = []
    for number in numbers:
        *prompt, answer = conversation(number)
        good = number % 2 == 0
        rows.append({"messages": [*prompt, answer if good else {**answer, "content": "I pass."}], "label": good})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judged(tmp_path_factory.mktemp("kto") / "train.jsonl", range(96))


@pytest.fixture(scope="module")
def eval_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judged(tmp_path_factory.mktemp("kto") / "eval.jsonl", range(100, 132))


def spec(model: dict[str, Any] | None = None, **training: Any) -> KtoSpec:
    return KtoSpec.model_validate(
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
    "model", [PEFT, {**PEFT, "quantization_config": {}}, {"use_peft": False}], ids=["lora", "qlora", "full"]
)
def test_good_answers_gain_on_bad_ones(
    model: dict[str, Any], tmp_path: Path, tiny: Path, train_file: Path, eval_file: Path
) -> None:
    ctx = context(tmp_path, tiny, train_file, eval_file)
    run(spec(model, learning_rate=1e-3 if "use_peft" in model else 5e-3), ctx)
    assert ctx.results["first_margin"] == pytest.approx(0, abs=1e-3), "policy and reference begin as one"
    assert ctx.results["eval_margin"] > 0.1
    assert ctx.results["eval_loss"] < ctx.results["first_loss"]
    names = {name for _, values in ctx.logged for name in values}
    assert {"rewards/margins", "kl", "loss"} <= names


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path, tiny: Path, train_file: Path, eval_file: Path) -> None:
    the_spec = spec(max_steps=6, learning_rate=1e-3)
    whole = context(tmp_path / "whole", tiny, train_file, eval_file)
    run(the_spec, whole)
    first = context(tmp_path / "first", tiny, train_file, eval_file)
    first.stop_after = 3
    with pytest.raises(Interrupted):
        run(the_spec, first)
    second = context(tmp_path / "second", tiny, train_file, eval_file)
    second.resume_from = first.checkpoints[-1][0]
    run(the_spec, second)
    name = "adapter_model.safetensors"
    assert (second.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_each_prompt_is_paired_with_another_answer_of_its_batch(tmp_path: Path, train_file: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    rows = load_judged(
        train_file,
        "auto",
        tokenizer,
        stops={tokenizer.eos_token_id},
        max_length=500,
        batch_size=4,
        seed=1,
        ctx=RecordingContext(tmp_path),
        field="dataset.file",
    )
    for start in range(0, len(rows), 4):
        batch = rows[start : start + 4]
        assert batch["KL_completion_ids"] == [batch["completion_ids"][-1], *batch["completion_ids"][:-1]]
    assert tokenizer.decode(rows[0]["completion_ids"]).endswith("<|im_end|>")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": conversation(1)}, "line 1: label: is missing"),
        ({"messages": conversation(1), "label": "yes"}, "must be true or false"),
        ({"messages": [*conversation(1), {"role": "user", "content": "?"}], "label": True}, "must end with the answer"),
        ({"messages": conversation(1), "label": True}, "labelled good"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference training"),
    ],
)
def test_rows_that_judge_nothing_are_refused(
    row: dict[str, Any], message: str, tmp_path: Path, tiny: Path, eval_file: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(RunError, match=message) as caught:
        run(spec(), context(tmp_path / "run", tiny, path, eval_file))
    assert (caught.value.code, caught.value.param) == (Code.BAD_DATA, "dataset.file")


def test_one_row_a_batch_is_refused_at_submit() -> None:
    with pytest.raises(ValueError, match="one row is too few"):
        spec(per_device_train_batch_size=1)
