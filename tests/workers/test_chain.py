"""An adapter trained on top of an adapter: everything below counts once, in training and in the merge."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from app.catalog import Catalog
from app.errors import Code, RunError
from tests.workers.context import RecordingContext
from workers.loading import MergeSpec, sha256_files
from workers.loading.weights import weight_files
from workers.merges import lora
from workers.operations.merge import run as merge
from workers.recipes import sft

CATALOG = Catalog(merges={"lora": lora.merge})


def train(root: Path, inputs: dict[str, Path], info: dict[str, dict[str, Any]], **training: Any) -> RecordingContext:
    block = {"model_name_or_path": "artifact:a", "peft_config": {"target_modules": "all-linear", "lora_dropout": 0.0}}
    training = {"max_steps": 5, "learning_rate": 1e-2, **training}
    spec = sft.SftSpec.model_validate({"model": block, "dataset": {"file": "f"}, "training": training})
    ctx = RecordingContext(root, inputs, info)
    sft.run(spec, ctx)
    return ctx


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny: Path, numbers: Path) -> Path:
    """An adapter on ``tiny``."""
    inputs = {"model.model_name_or_path": tiny, "dataset.file": numbers}
    return train(tmp_path_factory.mktemp("first"), inputs, {"model.model_name_or_path": {"name": "tiny"}}).folder


def on_top(root: Path, tiny: Path, below: Path, numbers: Path, *, under: tuple[Path, ...] = ()) -> RecordingContext:
    inputs = {"model.model_name_or_path": below, "model.model_name_or_path.base": tiny, "dataset.file": numbers}
    info = {
        "model.model_name_or_path": {"name": "first", "under": [str(layer) for layer in under]},
        "model.model_name_or_path.base": {"name": "tiny"},
    }
    return train(root, inputs, info, seed=7)


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[1, 50, 60, 70, 80]])).logits


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def merged(root: Path, adapter: Path, tiny: Path, under: tuple[Path, ...], **fields: Any) -> RecordingContext:
    ctx = RecordingContext(
        root,
        {"adapter": adapter, "base_model": tiny},
        {"adapter": {"name": "second", "under": [str(layer) for layer in under]}, "base_model": {"name": "tiny"}},
        catalog=CATALOG,
    )
    merge(MergeSpec.model_validate({"adapter": "artifact:b", "torch_dtype": "float32", **fields}), ctx)
    return ctx


def test_merging_the_last_folds_every_one_once(tmp_path: Path, tiny: Path, first: Path, numbers: Path) -> None:
    ctx = on_top(tmp_path / "second", tiny, first, numbers)
    assert "adapters_folded" in ctx.codes()
    second = ctx.folder
    result = merged(tmp_path / "merge", second, tiny, (first,))
    by_peft = PeftModel.from_pretrained(load(tiny), first).merge_and_unload()
    by_peft = PeftModel.from_pretrained(by_peft, second).merge_and_unload()
    assert torch.allclose(logits(load(result.folder)), logits(by_peft), atol=1e-5)
    certificate = result.results["certificate"]
    assert certificate["verdict"] == "passed"
    assert len(certificate["layers"]) == 1
    assert not torch.allclose(logits(load(tiny)), logits(by_peft), atol=1e-3)


@pytest.mark.parametrize("allow", [False, True])
def test_a_named_root_takes_the_whole_chain(
    allow: bool, tmp_path: Path, tiny: Path, first: Path, numbers: Path
) -> None:
    second = on_top(tmp_path / "second", tiny, first, numbers).folder
    named = {"base_model": "tiny", "allow_base_mismatch": allow, "proof_prompts": 0}
    with_name = merged(tmp_path / "named", second, tiny, (first,), **named)
    without = merged(tmp_path / "plain", second, tiny, (first,), proof_prompts=0)
    assert sha256_files(weight_files(with_name.folder)) == sha256_files(weight_files(without.folder))
    assert len(with_name.results["certificate"]["layers"]) == 1


def test_another_base_takes_the_last_alone_and_says_so(tmp_path: Path, tiny: Path, first: Path, numbers: Path) -> None:
    second = on_top(tmp_path / "second", tiny, first, numbers).folder
    other = merged(tmp_path / "other", first, tiny, ()).folder
    with pytest.raises(RunError, match="has other weights of the same shapes"):
        merged(tmp_path / "refused", second, other, (first,), base_model="other")
    named = {"base_model": "other", "allow_base_mismatch": True}
    ctx = merged(tmp_path / "merge", second, other, (first,), **named)
    event = next(event for event in ctx.events if event["code"] == "layers_left_out")
    assert (event["level"], event["layers"]) == ("warn", 1)
    assert ctx.results["certificate"]["layers"] == []


def test_a_run_starts_where_the_adapter_below_ended(tmp_path: Path, tiny: Path, first: Path, numbers: Path) -> None:
    ctx = on_top(tmp_path / "second", tiny, first, numbers)
    start = load(ctx.work_dir / "start")
    assert torch.allclose(logits(start), logits(PeftModel.from_pretrained(load(tiny), first)), atol=1e-5)


def test_three_in_a_row(tmp_path: Path, tiny: Path, first: Path, numbers: Path) -> None:
    second = on_top(tmp_path / "second", tiny, first, numbers).folder
    third = on_top(tmp_path / "third", tiny, second, numbers, under=(first,)).folder
    result = merged(tmp_path / "merge", third, tiny, (first, second))
    model = load(tiny)
    for adapter in (first, second, third):
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    assert torch.allclose(logits(load(result.folder)), logits(model), atol=1e-5)


@pytest.mark.parametrize("layers", ["none", "twice"])
def test_a_chain_with_a_link_too_few_or_too_many_is_refused(
    layers: str, tmp_path: Path, tiny: Path, first: Path, numbers: Path
) -> None:
    second = on_top(tmp_path / "second", tiny, first, numbers).folder
    with pytest.raises(RunError, match="on top of 1 other") as caught:
        merged(tmp_path / "merge", second, tiny, () if layers == "none" else (first, first))
    assert caught.value.code == Code.BASE_MISMATCH


def test_an_adapter_without_its_base_is_refused(tmp_path: Path, first: Path, numbers: Path) -> None:
    inputs = {"model.model_name_or_path": first, "dataset.file": numbers}
    with pytest.raises(RunError, match="its base is not known") as caught:
        train(tmp_path, inputs, {"model.model_name_or_path": {"name": "first"}})
    assert caught.value.param == "model.model_name_or_path"
