"""An adapter is looked at without loading a model; out of a checkpoint only what belongs to it comes along."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from app.errors import Code, RunError
from tests.workers.conftest import make_model
from tests.workers.context import RecordingContext
from workers.loading import Compute, load_base, read_adapter
from workers.loading.fresh import START_FILE
from workers.operations import check_adapter, extract_adapter
from workers.recipes import sft

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: Path, numbers: Path) -> RecordingContext:
    """A run of two steps with a checkpoint after each."""
    ctx = RecordingContext(tmp_path_factory.mktemp("run"), {"model.model_name_or_path": tiny, "dataset.file": numbers})
    peft = {"r": 4, "target_modules": "minimal"}
    training = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2}
    spec: dict[str, Any] = {"model": {"model_name_or_path": "org/tiny", "peft_config": peft}, "training": training}
    sft.run(sft.SftSpec.model_validate({**spec, "dataset": {"file": "f"}}), ctx)
    return ctx


@pytest.fixture
def adapter(tmp_path: Path, trained: RecordingContext) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(trained.folder, tmp_path / "adapter")


def check(root: Path, folder: Path, base: Path | None = None, **fields: Any) -> RecordingContext:
    inputs = {"adapter": folder, **({"base_model": base} if base else {})}
    ctx = RecordingContext(root / "check", inputs, {"base_model": {"path": str(base)}} if base else {})
    try:
        check_adapter.run(check_adapter.CheckAdapterSpec(adapter="some", **fields), ctx)
    except RunError as error:
        ctx.results["error"] = error
    return ctx


def said(ctx: RecordingContext) -> list[str]:
    return [f"{problem['level']}: {problem['message']}" for problem in ctx.results["report"]["problems"]]


def test_the_report_says_what_the_adapter_is(tmp_path: Path, adapter: Path, tiny: Path) -> None:
    ctx = check(tmp_path, adapter, tiny)
    report = ctx.results["report"]
    assert "error" not in ctx.results
    assert (report["ok"], report["problems"]) == (True, [])
    assert (report["type"], report["base"], report["base_here"]) == ("LORA", "org/tiny", True)
    assert (report["r"], report["alpha"], report["dropout"], report["bias"]) == (4, 8, 0.1, "none")
    assert (report["targets"], report["modules"]) == (["q_proj", "v_proj"], 4)
    # Two layers; q: 4 x 64 and 64 x 4, v: 4 x 64 and 32 x 4.
    assert report["parameters"] == 2 * (4 * (64 + 64) + 4 * (64 + 32))
    assert report["share"] == report["parameters"] / load_base(tiny, Compute("cpu", "float32")).num_parameters()
    assert report["trained_on"] == "unquantised weights"


def test_the_report_says_how_much_each_layer_changes(tmp_path: Path, adapter: Path, tiny: Path) -> None:
    report = check(tmp_path, adapter, tiny).results["report"]
    tensors, before = load_file(adapter / WEIGHTS), load_file(tiny / "model.safetensors")
    squares: dict[int, float] = {0: 0.0, 1: 0.0}
    relative = []
    for name in tensors:
        if ".lora_A." in name:
            delta = (
                read_adapter(adapter).config["lora_alpha"]
                / 4
                * tensors[name.replace("lora_A", "lora_B")]
                @ tensors[name]
            )
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            squares[int(module.split(".")[2])] += float(delta.norm()) ** 2
            relative.append(float(delta.norm() / before[f"{module}.weight"].norm()))
    assert [layer["layer"] for layer in report["layers"]] == [0, 1]
    for layer in report["layers"]:
        assert layer["norm"] == pytest.approx(squares[layer["layer"]] ** 0.5, rel=1e-4)
    assert report["update_norm"] == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-4)
    assert report["relative_update"]["most"] == pytest.approx(max(relative), rel=1e-4)
    assert (report["dead_modules"], report["exploding_modules"]) == ([], [])


def test_dead_and_exploding_modules_are_named(tmp_path: Path, adapter: Path, tiny: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    ends = sorted(name for name in tensors if ".lora_B." in name)
    tensors[ends[0]].zero_()
    tensors[ends[1]].mul_(1e6)
    save_file(tensors, adapter / WEIGHTS)
    ctx = check(tmp_path, adapter, tiny)
    modules = [name.removeprefix("base_model.model.").removesuffix(".lora_B.weight") for name in ends]
    report = ctx.results["report"]
    assert (report["ok"], report["dead_modules"], report["exploding_modules"]) == (True, modules[:1], modules[1:2])
    lines = " ".join(said(ctx))
    assert f"1 of {len(ends)} modules change nothing, e.g. {modules[0]}" in lines
    assert f"1 modules change their weights by more than the weights themselves, e.g. {modules[1]}" in lines


def test_a_base_that_is_not_here_is_not_fetched(tmp_path: Path, adapter: Path) -> None:
    report = check(tmp_path, adapter).results["report"]
    assert (report["ok"], report["base"], report["base_here"], report["share"]) == (True, "org/tiny", False, None)


def test_an_adapter_of_another_base_is_an_error(tmp_path: Path, adapter: Path) -> None:
    other = make_model(tmp_path / "other", seed=1)
    ctx = check(tmp_path, adapter, other)
    assert ctx.results["error"].code == Code.BASE_MISMATCH
    assert "other weights of the same shapes" in said(ctx)[0]
    wider = check(tmp_path, adapter, make_model(tmp_path / "wider", hidden_size=128))
    assert "the adapter was made for a weight of" in said(wider)[0]


def test_what_is_broken_is_named(tmp_path: Path, adapter: Path, tiny: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    name = next(name for name in tensors if ".lora_B." in name)
    save_file({**tensors, name: tensors[name] * float("nan")}, adapter / WEIGHTS, {"format": "pt"})
    ctx = check(tmp_path, adapter, tiny)
    assert ctx.results["error"].code == Code.ADAPTER_INVALID
    assert said(ctx) == [f"error: 1 tensors hold NaN or infinity, e.g. {name}"]
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    ctx = check(tmp_path, adapter, tiny)
    assert "adapter_model.safetensors is missing" in said(ctx)[0]
    assert "pickle" in ctx.results["report"]["problems"][0]["hint"]
    assert ctx.results["report"]["r"] == 4


def test_an_adapter_that_does_nothing_is_a_warning(tmp_path: Path, adapter: Path, tiny: Path) -> None:
    tensors = {name: tensor * (".lora_A." in name) for name, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "v_proj", "up"]}))
    (adapter / "base_model.json").unlink()
    ctx = check(tmp_path, adapter, tiny)
    assert "error" not in ctx.results
    assert [line.split(":")[0] for line in said(ctx)] == ["warning"] * 3
    assert "every B matrix is zero" in said(ctx)[0]
    assert "names up, for which it holds no weights" in said(ctx)[1]
    assert "does not say which weights" in said(ctx)[2]


def extract(at: Path, folder: Path, **info: Any) -> RecordingContext:
    about = {"model": info, "base_model": {"path": info.pop("root", None)}}
    ctx = RecordingContext(at / "extract", {"model": folder}, about)
    extract_adapter.run(extract_adapter.ExtractAdapterSpec(model="some", output_name="mine"), ctx)
    return ctx


def test_an_adapter_leaves_the_trainer_behind(tmp_path: Path, trained: RecordingContext, tiny: Path) -> None:
    checkpoint, step = trained.checkpoints[0]
    assert step == 1
    ctx = extract(tmp_path, checkpoint, kind="adapter", base="hub:org/tiny", root=str(tiny))
    kind, folder, facts = ctx.outputs[0]
    assert (kind, facts["name"], facts["base"]) == ("adapter", "mine", "hub:org/tiny")
    assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", WEIGHTS, "tokenizer.json"}
    assert {"optimizer.pt", "trainer_state.json"} <= set(ctx.results["left_behind"])
    assert not {path.name for path in folder.iterdir()} & set(ctx.results["left_behind"])
    assert (folder / WEIGHTS).read_bytes() == (checkpoint / WEIGHTS).read_bytes()
    PeftModel.from_pretrained(load_base(tiny, Compute("cpu", "float32")), folder)
    # The checkpoint does not say what it was trained on; the extracted adapter does.
    assert "error" not in check(tmp_path, folder, tiny).results
    assert said(check(tmp_path, folder, tiny)) == []
    assert check(tmp_path, folder, make_model(tmp_path / "o", seed=1)).results["error"].code == Code.BASE_MISMATCH


def test_a_checkpoint_that_holds_a_part_of_the_base_becomes_a_plain_adapter(
    tmp_path: Path, adapter: Path, tiny: Path
) -> None:
    """As PiSSA leaves it: what the adapter began with lies beside it, and is taken off again."""
    held = {}
    for name, tensor in load_file(adapter / WEIGHTS).items():
        module, _, part = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        held[f"{module}.{part}"] = torch.zeros_like(tensor)
    save_file(held, adapter / START_FILE)
    with pytest.raises(RunError, match="began with a part of its base") as caught:
        read_adapter(adapter)
    assert "extract_adapter" in (caught.value.hint or "")
    folder = extract(tmp_path, adapter, kind="adapter").folder
    assert not (folder / START_FILE).exists()
    assert read_adapter(folder).config["r"] == 8, "twice the rank: what it is, less what it began with"
    assert said(check(tmp_path, folder, tiny)) == []


def test_the_adapter_of_a_judge_stays_a_judge(tmp_path: Path, trained: RecordingContext) -> None:
    assert extract(tmp_path, trained.folder, kind="reward").outputs[0][0] == "reward"


def test_a_whole_model_has_no_adapter_to_take_out(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(RunError, match="it holds a whole model") as caught:
        extract(tmp_path, tiny)
    assert (caught.value.code, caught.value.param) == (Code.ADAPTER_INVALID, "model")


def test_weights_that_are_not_finite_stay_where_they_are(tmp_path: Path, adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    save_file({name: tensor * torch.inf for name, tensor in tensors.items()}, adapter / WEIGHTS, {"format": "pt"})
    with pytest.raises(RunError, match="NaN or infinity"):
        extract(tmp_path, adapter)
