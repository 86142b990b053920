"""Merging: exact where it can be, refused where it must be, and never silently without effect."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from app.catalog import Catalog
from app.errors import Code, RunError
from tests.workers.conftest import make_model
from tests.workers.context import RecordingContext
from workers.loading import MergeSpec, compare, proved, tensor_headers
from workers.merges import lora
from workers.operations.merge import run
from workers.recipes import sft

CATALOG = Catalog(merges={"lora": lora.merge})
Trainer = Callable[..., Path]


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory, numbers: Path) -> Trainer:
    """Trains an adapter on a base and returns its folder."""

    def train(base: Path, *, steps: int = 10, learning_rate: float = 1e-2, **peft: Any) -> Path:
        block = {"model_name_or_path": "tiny", "peft_config": {"target_modules": "all-linear", **peft}}
        training = {"max_steps": steps, "learning_rate": learning_rate}
        spec = sft.SftSpec.model_validate({"model": block, "dataset": {"file": "f"}, "training": training})
        ctx = RecordingContext(
            tmp_path_factory.mktemp("adapter"), {"model.model_name_or_path": base, "dataset.file": numbers}
        )
        sft.run(spec, ctx)
        return ctx.folder

    return train


@pytest.fixture(scope="session")
def adapter(train: Trainer, tiny: Path) -> Path:
    """A trained adapter of ``tiny``; do not write into it."""
    return train(tiny)


def merge(root: Path, adapter: Path, base: Path, **fields: Any) -> RecordingContext:
    spec = MergeSpec.model_validate({"adapter": "artifact:art-a", **fields})
    ctx = RecordingContext(root, {"adapter": adapter, "base_model": base}, catalog=CATALOG)
    run(spec, ctx)
    return ctx


def logits_of(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[1, 50, 60, 70, 80]])).logits


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    "peft",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"target_modules": ["q_proj", "down_proj"]},
    ],
)
def test_the_merged_model_gives_the_logits_of_base_and_adapter(
    peft: dict[str, Any], tmp_path: Path, tiny: Path, train: Trainer
) -> None:
    folder = train(tiny, **peft)
    ctx = merge(tmp_path, folder, tiny)
    expected = logits_of(PeftModel.from_pretrained(load(tiny), folder))
    assert torch.allclose(logits_of(load(ctx.folder)), expected, atol=1e-5)
    assert not torch.allclose(logits_of(load(tiny)), expected, atol=1e-2)
    certificate = ctx.results["certificate"]
    assert certificate["verdict"] == "passed"
    assert certificate["retained"] > 0.9999
    assert certificate["top1_agreement"] == 1
    assert json.loads((ctx.folder / "certificate.json").read_text()) == certificate
    assert tensor_headers(ctx.folder).keys() == tensor_headers(tiny).keys()
    assert (ctx.folder / "model.safetensors").stat().st_size == (tiny / "model.safetensors").stat().st_size
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "generation_config.json"):
        assert (ctx.folder / name).read_bytes() == (tiny / name).read_bytes()


def test_a_16_bit_base_stays_16_bit_and_the_sum_is_rounded_once(tmp_path: Path, train: Trainer) -> None:
    base = make_model(tmp_path / "base", dtype="bfloat16")
    folder = train(base)
    ctx = merge(tmp_path, folder, base)
    assert {tensor.dtype for tensor in tensor_headers(ctx.folder).values()} == {"BF16"}
    assert ctx.results["weight_bytes"] == sum(tensor.bytes for tensor in tensor_headers(base).values())
    assert ctx.results["certificate"]["dtype"] == "bfloat16"
    # The same as peft does in place on a bfloat16 base with the adapter in float32.
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), folder)
    expected = plain.merge_and_unload(safe_merge=False).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(ctx.folder, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_the_asked_dtype_is_written(tmp_path: Path, tiny: Path, adapter: Path) -> None:
    ctx = merge(tmp_path, adapter, tiny, torch_dtype="float16")
    assert {tensor.dtype for tensor in tensor_headers(ctx.folder).values()} == {"F16"}
    assert json.loads((ctx.folder / "config.json").read_text())["dtype"] == "float16"


def test_a_merge_that_does_nothing_is_caught(tmp_path: Path, tiny: Path, adapter: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("workers.loading.shards.changed", lambda steps, rows, block: rows)
    with pytest.raises(RunError, match="not what base and adapter give: model.*proj.weight differs") as caught:
        merge(tmp_path, adapter, tiny)
    assert caught.value.code == Code.VALIDATION_FAILED


def test_a_merge_that_touches_other_tensors_is_caught(
    tmp_path: Path, tiny: Path, adapter: Path, monkeypatch: Any
) -> None:
    write = proved.write_merge

    def careless(merge: Any, folder: Path, *rest: Any, **named: Any) -> Any:
        digests = write(merge, folder, *rest, **named)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"].mul_(1.001)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return digests

    monkeypatch.setattr(proved, "write_merge", careless)
    with pytest.raises(RunError, match=r"base and adapter give: model\.norm\.weight differs"):
        merge(tmp_path, adapter, tiny)


def test_a_small_effect_that_the_dtype_swallows_is_caught(tmp_path: Path, train: Trainer) -> None:
    base = make_model(tmp_path / "base", dtype="bfloat16")
    faint = train(base, steps=1, learning_rate=1e-5)
    with pytest.raises(RunError) as caught:
        merge(tmp_path, faint, base)
    assert caught.value.code == Code.EFFECT_LOST
    assert "float32" in (caught.value.hint or "")
    ctx = merge(tmp_path / "wide", faint, base, torch_dtype="float32")
    assert ctx.results["certificate"]["retained"] > 0.99


def test_weights_that_are_not_finite_are_caught(tmp_path: Path, tiny: Path, adapter: Path) -> None:
    broken = shutil.copytree(adapter, tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    tensors[next(name for name in tensors if "lora_B" in name)][0, 0] = float("inf")
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(RunError) as caught:
        merge(tmp_path, broken, tiny)
    assert caught.value.code == Code.NON_FINITE_WEIGHTS


def test_another_base_of_the_same_shapes_is_refused_unless_allowed(tmp_path: Path, adapter: Path) -> None:
    sibling = make_model(tmp_path / "sibling", seed=1)
    with pytest.raises(RunError, match="other weights of the same shapes") as caught:
        merge(tmp_path, adapter, sibling)
    assert caught.value.code == Code.BASE_MISMATCH
    certificate = merge(tmp_path, adapter, sibling, allow_base_mismatch=True).results["certificate"]
    assert certificate["base"]["mismatch_allowed"] is True
    assert certificate["adapter"]["base"] == {"name": "tiny", "weights": "other"}


@pytest.mark.parametrize(
    ("named", "code"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "base_name_differs"),
        ("/data/models/llama", "base_name_differs"),
        ("org/Tiny-bnb-4bit", "base_unproved"),
        (None, "base_unproved"),
    ],
)
def test_an_adapter_made_elsewhere_is_held_against_the_name_that_it_gives(
    named: str | None, code: str, tmp_path: Path, tiny: Path, adapter: Path
) -> None:
    """The usual mistake is the wrong base of the right shapes, and all that can tell is the adapter's config."""
    foreign = shutil.copytree(adapter, tmp_path / "foreign")
    (foreign / "base_model.json").unlink()
    config = json.loads((foreign / "adapter_config.json").read_text()) | {"base_model_name_or_path": named}
    (foreign / "adapter_config.json").write_text(json.dumps(config))
    ctx = merge(tmp_path, foreign, tiny, base_model="hub:org/tiny", proof_prompts=0)
    (event,) = [event for event in ctx.events if event["code"].startswith("base_")]
    assert (event["code"], event["level"]) == (code, "warn" if code == "base_name_differs" else "info")
    label = named and named.removeprefix("/data/models/")
    assert ctx.results["certificate"]["adapter"]["base"] == {"name": label, "weights": "unknown"}
    if code == "base_name_differs":
        assert f"merge into {label}" in event["message"]


@pytest.mark.parametrize("allow", [True, False])
def test_a_base_of_other_shapes_is_refused(allow: bool, tmp_path: Path, tiny: Path, adapter: Path) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:96].clone()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"layers\.0\.mlp\.up_proj: .*\[128, 64\].* has \[96, 64\]") as caught:
        merge(tmp_path, adapter, other, allow_base_mismatch=allow)
    assert caught.value.code == Code.BASE_MISMATCH


def test_a_quantised_base_is_refused(tmp_path: Path, tiny: Path, adapter: Path) -> None:
    base = shutil.copytree(tiny, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="awq") as caught:
        merge(tmp_path, adapter, base, base_model="hub:org/Some-7B-AWQ")
    assert caught.value.code == Code.QUANTISED_BASE
    assert (caught.value.hint or "").endswith("org/Some-7B")


def test_a_pickled_adapter_is_refused_unopened(tmp_path: Path, tiny: Path, adapter: Path) -> None:
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(RunError, match="missing") as caught:
        merge(tmp_path, pickled, tiny)
    assert caught.value.code == Code.ADAPTER_INVALID
    assert "pickle" in (caught.value.hint or "")


def test_an_unknown_method_names_the_known_ones(tmp_path: Path, tiny: Path, adapter: Path) -> None:
    with pytest.raises(RunError, match="there are: lora"):
        merge(tmp_path, adapter, tiny, method="ties")


def test_the_effect_is_one_minus_the_ratio_of_divergences() -> None:
    # Two tokens of two entries: p = (½, ½) against q = (¾, ¼): KL = ½ ln(2/3) + ½ ln 2.
    half = torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    other = torch.log(torch.tensor([[0.75, 0.25], [0.75, 0.25]]))
    effect = compare([half], [other], [other])
    assert effect.kl_tuned_base == pytest.approx(0.143841, abs=1e-6)
    assert effect.retained == pytest.approx(0)
    assert compare([half], [other], [half]).retained == pytest.approx(1)
    assert compare([half], [half], [half]).retained is None
