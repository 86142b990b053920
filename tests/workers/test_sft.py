"""Supervised fine-tuning on a model that fits into a second: it learns, it is exact, it says what went wrong."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from app.catalog import Catalog, Interrupted
from app.errors import Code, RunError
from app.storage import Storage
from tests.workers.conftest import conversation, make_tokenizer
from tests.workers.context import RecordingContext
from workers.checkpoints import committed
from workers.context import JobContext
from workers.loading.devices import Compute
from workers.loading.products import quicken
from workers.recipes import sft as recipe
from workers.recipes.sft import SftSpec, run

pytestmark = pytest.mark.filterwarnings(
    # bitsandbytes and peft touch deprecated corners of torch; nothing of ours is in these messages.
    "ignore::DeprecationWarning:bitsandbytes",
    "ignore:.*_check_is_size will be removed:FutureWarning",
)


def spec(*, model: dict[str, Any] | None = None, **training: Any) -> SftSpec:
    training = {"max_steps": 12, "learning_rate": 1e-2, **training}
    return SftSpec.model_validate(
        {
            "model": {"model_name_or_path": "artifact:art-tiny", **(model or {})},
            "dataset": {"file": "file-1", "eval_file": training.pop("eval_file", None)},
            "training": training,
        }
    )


def context(root: Path, base: Path, data: Path, **more: Path) -> RecordingContext:
    inputs = {"model.model_name_or_path": base, "dataset.file": data, **more}
    return RecordingContext(root, inputs, {"model.model_name_or_path": {"name": "tiny"}})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


ALL_LINEAR = {"peft_config": {"r": 16, "target_modules": "all-linear", "lora_dropout": 0.1}}


@pytest.mark.parametrize(
    ("method", "model"),
    [
        ("lora", ALL_LINEAR),
        ("qlora", {**ALL_LINEAR, "quantization_config": {}}),
        ("full", {"use_peft": False}),
    ],
)
def test_each_method_lowers_the_loss(
    method: str, model: dict[str, Any], tmp_path: Path, tiny: Path, numbers: Path
) -> None:
    ctx = context(tmp_path, tiny, numbers)
    run(spec(model=model), ctx)
    assert sum(ctx.losses[-3:]) < 0.95 * sum(ctx.losses[:3])
    kind, folder, facts = ctx.outputs[0]
    assert kind == ("model" if method == "full" else "adapter")
    assert facts["learning"]["final_loss"] == pytest.approx(ctx.losses[-1])
    assert (folder / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    assert (folder / "chat_template.jinja").exists()
    assert (folder / "LICENSE").exists()
    assert not list(folder.glob("*.bin"))
    assert ctx.results["steps"] == 12
    assert ctx.results["peak_memory_bytes"] > 1 << 20
    assert ctx.results["tokens_per_second"] > 0
    assert ctx.phases == ["staging", "loading", "training", "saving"]
    assert [step["step"] for step in ctx.steps] == list(range(1, 13))
    trainable = next(event for event in ctx.events if event["code"] == "trainable_parameters")
    assert (trainable["share"] == 1) == (method == "full")
    assert ctx.results["trainable_parameters"] == trainable["trainable"]
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.glob("*.json"))


def test_the_dtype_that_the_hardware_lacks_is_replaced_and_shown(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU computes in bfloat16")
    ctx = context(tmp_path, tiny, numbers)
    run(spec(model={"dtype": "bfloat16"}, max_steps=1), ctx)
    assert ctx.resolutions["model.dtype"] == "float32"
    assert "dtype_replaced" in ctx.codes()


def test_equal_runs_leave_equal_bytes(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    folders = []
    for name in ("first", "second"):
        ctx = context(tmp_path / name, tiny, numbers)
        run(spec(model=ALL_LINEAR, max_steps=5), ctx)
        folders.append(ctx.folder)
    for name in ("adapter_model.safetensors", "adapter_config.json", "base_model.json"):
        assert sha256(folders[0] / name) == sha256(folders[1] / name)
    ctx = context(tmp_path / "third", tiny, numbers)
    run(spec(model=ALL_LINEAR, max_steps=5, seed=7), ctx)
    assert sha256(ctx.folder / "adapter_model.safetensors") != sha256(folders[0] / "adapter_model.safetensors")


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    # 200 rows in batches of 32 are 7 steps an epoch: the stop lies in the second.
    settings = {"max_steps": 16, "per_device_train_batch_size": 32}
    whole = context(tmp_path / "whole", tiny, numbers)
    run(spec(model=ALL_LINEAR, **settings), whole)

    stopped = context(tmp_path / "stopped", tiny, numbers)
    stopped.stop_after = 9
    with pytest.raises(Interrupted):
        run(spec(model=ALL_LINEAR, **settings), stopped)
    assert stopped.outputs == []
    assert [step for _, step in stopped.checkpoints] == [9]

    resumed = context(tmp_path / "resumed", tiny, numbers)
    resumed.resume_from = stopped.checkpoints[0][0]
    run(spec(model=ALL_LINEAR, **settings), resumed)
    assert [step["step"] for step in resumed.steps] == list(range(10, 17))
    assert resumed.losses == whole.losses[9:]
    assert resumed.results["train_loss"] == pytest.approx(whole.results["train_loss"])
    name = "adapter_model.safetensors"
    assert sha256(resumed.folder / name) == sha256(whole.folder / name)


@pytest.mark.parametrize(
    ("model", "left"),
    [
        ({}, {2: False, 4: False, 6: True, 7: True}),
        ({"use_peft": False}, {6: True, 7: True}),
    ],
)
def test_checkpoints_are_committed_and_thinned(
    model: dict[str, Any], left: dict[int, bool], tmp_path: Path, tiny: Path, numbers: Path
) -> None:
    """Of an adapter's run all weights stay, of a full fine-tune two checkpoints; the newest two can be resumed."""
    attempt = {
        "job_id": "job-1",
        "inputs": {
            "model.model_name_or_path": {"path": str(tiny), "name": "tiny"},
            "dataset.file": {"path": str(numbers)},
        },
    }
    folder = tmp_path / "a1"
    folder.mkdir()
    ctx = JobContext(folder, attempt, Catalog())
    run(spec(model=model, max_steps=7, save_steps=2), ctx)
    ctx.settle()
    found = {item.step: item.resumable for item in committed(tmp_path, 1)}
    assert found == left
    for step, resumable in found.items():
        checkpoint = ctx.checkpoint_dir / f"checkpoint-{step}"
        assert Storage.checkpoint_faults(checkpoint) == []
        assert (checkpoint / "optimizer.pt").exists() == resumable
        assert (checkpoint / "trainer_state.json").exists() == resumable
        assert (checkpoint / "tokenizer.json").exists()
        if not model:
            config = json.loads((checkpoint / "adapter_config.json").read_text())
            assert config["base_model_name_or_path"] == "tiny"
            assert config["target_modules"] == sorted(config["target_modules"])


def test_a_checkpoint_by_the_clock_changes_no_byte_and_can_be_resumed(
    tmp_path: Path, tiny: Path, numbers: Path
) -> None:
    settings = {"max_steps": 9, "per_device_train_batch_size": 32}
    plain = context(tmp_path / "plain", tiny, numbers)
    run(spec(model=ALL_LINEAR, **settings), plain)
    assert [step for _, step in plain.checkpoints] == [9]
    timed = context(tmp_path / "timed", tiny, numbers)
    run(spec(model=ALL_LINEAR, checkpoint_seconds=0.001, **settings), timed)
    # Due at once; then not before writing has become 2 % of the time, which nine such steps do not last.
    first, step = timed.checkpoints[0]
    assert step == 1
    assert len(timed.checkpoints) < 9
    name = "adapter_model.safetensors"
    assert sha256(timed.folder / name) == sha256(plain.folder / name)
    resumed = context(tmp_path / "resumed", tiny, numbers)
    resumed.resume_from = first
    run(spec(model=ALL_LINEAR, **settings), resumed)
    assert [entry["step"] for entry in resumed.steps] == list(range(2, 10))
    assert sha256(resumed.folder / name) == sha256(plain.folder / name)


def test_a_held_out_loss_belongs_to_its_checkpoint(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(json.dumps({"messages": conversation(number)}) for number in range(500, 504)))
    ctx = context(tmp_path, tiny, numbers, **{"dataset.eval_file": held})
    settings = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2}
    run(spec(eval_file="file-2", max_steps=4, save_steps=1, **settings), ctx)
    assert [("eval_loss" in metrics, "loss" in metrics) for metrics in ctx.announced] == [
        (False, True),  # the first step is logged too
        (True, True),
        (False, True),
        (True, True),
    ]


def test_held_out_loss_is_measured_before_and_after(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    held = tmp_path / "held.jsonl"
    rows = [{"messages": conversation(number)} for number in range(500, 520)]
    held.write_text("\n".join(json.dumps(row) for row in rows))
    ctx = context(tmp_path, tiny, numbers, **{"dataset.eval_file": held})
    run(spec(model={"use_peft": False}, eval_file="file-2"), ctx)
    assert ctx.results["eval_loss"] < ctx.results["eval_loss_base"]
    assert ctx.results["eval_loss_base"] == pytest.approx(math.log(400), rel=0.15)


def test_the_lean_loss_is_the_loss_of_the_library(tmp_path: Path, tiny: Path, numbers: Path, monkeypatch: Any) -> None:
    settings = {"model": {"peft_config": {"lora_dropout": 0.0}}, "max_steps": 3, "gradient_accumulation_steps": 2}
    lean = context(tmp_path / "lean", tiny, numbers)
    run(spec(**settings), lean)
    monkeypatch.setattr("workers.recipes.sft.takes_positions", lambda model: False)
    plain = context(tmp_path / "plain", tiny, numbers)
    run(spec(**settings), plain)
    assert lean.losses == pytest.approx(plain.losses, abs=1e-5)
    lean_log, plain_log = (dict(ctx.logged[-1][1]) for ctx in (lean, plain))
    assert lean_log["mean_token_accuracy"] == pytest.approx(plain_log["mean_token_accuracy"], abs=1e-6)


def test_a_saved_adapter_gives_the_same_logits_in_plain_peft(
    tmp_path: Path, tiny: Path, numbers: Path, monkeypatch: Any
) -> None:
    trained: list[Any] = []
    original = recipe.run_trainer
    monkeypatch.setattr(
        recipe, "run_trainer", lambda trainer, *rest: (trained.append(trainer), original(trainer, *rest))
    )
    ctx = context(tmp_path, tiny, numbers)
    run(spec(model=ALL_LINEAR), ctx)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), ctx.folder)
    ids = torch.tensor([[1, 50, 60, 70]])
    with torch.no_grad():
        expected = trained[0].model.eval()(input_ids=ids).logits
        assert torch.allclose(loaded.eval()(input_ids=ids).logits, expected, atol=1e-5)
        # By the same products, to the last bit.
        assert torch.equal(quicken(loaded, Compute("cpu", "float32"))(input_ids=ids).logits, expected)
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ({"peft_config": {"target_modules": ["q_proj", "query"]}}, Code.TARGET_MODULES_NOT_FOUND, ("query", "q_proj")),
        ({"peft_config": {"target_modules": ["lm_head"]}}, Code.BAD_SPEC, ("lm_head",)),
        ({"peft_config": {"target_modules": ["act_fn"]}}, Code.TARGET_MODULES_NOT_FOUND, ("act_fn", "q_proj")),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(
    model: dict[str, Any], code: Code, words: tuple[str, ...], tmp_path: Path, tiny: Path, numbers: Path
) -> None:
    with pytest.raises(RunError) as caught:
        run(spec(model=model), context(tmp_path, tiny, numbers))
    assert caught.value.code == code
    assert all(word in f"{caught.value.message} {caught.value.hint}" for word in words)


def test_a_quantised_base_is_refused_with_its_sibling(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    base = shutil.copytree(tiny, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (base / "config.json").write_text(json.dumps(config))
    model = {"model_name_or_path": "hub:org/Some-7B-GPTQ-Int4", "quantization_config": {}}
    with pytest.raises(RunError, match="gptq") as caught:
        run(spec(model=model), context(tmp_path, base, numbers))
    assert caught.value.code == Code.QUANTISED_BASE
    assert "hub:org/Some-7B" in (caught.value.hint or "")
    assert "GPTQ" not in (caught.value.hint or "")


def test_three_steps_without_a_finite_loss_end_the_run(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    ctx = context(tmp_path, tiny, numbers)
    with pytest.raises(RunError, match="up to step 3") as caught:
        run(spec(save_steps=1), _poisoned(ctx, tmp_path))
    assert caught.value.code == Code.NON_FINITE_LOSS
    assert "non_finite_loss" in ctx.codes()
    assert [step["loss"] for step in ctx.steps] == [None, None]
    assert ctx.checkpoints == []
    assert ctx.outputs == []


def _poisoned(ctx: RecordingContext, root: Path) -> RecordingContext:
    """The same context over a base with one weight that is not a number."""
    base = shutil.copytree(ctx.input("model.model_name_or_path"), root / "poisoned")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    ctx._inputs["model.model_name_or_path"] = base
    return ctx


def test_a_base_that_lacks_tensors_is_not_filled_with_random_numbers(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    base = shutil.copytree(tiny, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="up_proj") as caught:
        run(spec(), context(tmp_path, base, numbers))
    assert caught.value.code == Code.MODEL_INVALID


def test_a_cut_weight_file_is_named(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    base = shutil.copytree(tiny, tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RunError, match="cut short"):
        run(spec(), context(tmp_path, base, numbers))


def test_conversations_need_a_chat_template_and_pairs_do_not(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    make_tokenizer(base, template=None)
    with pytest.raises(RunError, match="chat template") as caught:
        run(spec(), context(tmp_path / "chat", base, numbers))
    assert caught.value.code == Code.BAD_SPEC
    assert caught.value.hint
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps({"prompt": f"{n}: ", "completion": "one two"}) for n in range(40)))
    ctx = context(tmp_path / "pairs", base, pairs)
    run(spec(max_steps=2), ctx)
    assert ctx.outputs


def test_an_adapter_is_no_base(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    ctx = context(tmp_path / "first", tiny, numbers)
    run(spec(max_steps=1), ctx)
    with pytest.raises(RunError, match="is an adapter") as caught:
        run(spec(max_steps=1), context(tmp_path / "second", ctx.folder, numbers))
    assert caught.value.code == Code.BAD_SPEC
