"""Several adapters as one: what peft's add_weighted_adapter makes of them, and a proved merge of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import merge_utils
from safetensors.torch import load_file

from app.discovery import discover
from app.errors import Code, RunError
from tests.workers.conftest import make_model
from tests.workers.context import RecordingContext
from tests.workers.test_streaming import load, make_adapter
from workers.loading import MergeSpec, tensor_headers, write_base_record
from workers.operations.merge import run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CATALOG = discover(["workers.merges"])
SEVERAL = sorted(name for name, method in CATALOG.merges.items() if "adapters" in method.takes)
WEIGHTS = [0.7, -0.4, 1.1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("combining") / "base")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, base: Path) -> list[Path]:
    """Three of rank 4; the second goes on fewer modules, the third has another scale."""
    root = tmp_path_factory.mktemp("adapters")
    kinds: list[dict[str, Any]] = [{}, {"target_modules": ["q_proj", "v_proj"]}, {"lora_alpha": 16, "use_rslora": True}]
    return [make_adapter(root / str(number), base, seed=number, **kind) for number, kind in enumerate(kinds)]


def merged(root: Path, base: Path, adapters: list[Path], info: Any = None, **fields: Any) -> RecordingContext:
    inputs = {f"adapters.{number}": adapter for number, adapter in enumerate(adapters)}
    ctx = RecordingContext(root, inputs | {"base_model": base}, info, catalog=CATALOG)
    spec = {"adapters": [f"artifact:{adapter.name}" for adapter in adapters], "weights": WEIGHTS, **fields}
    run(MergeSpec.model_validate(spec), ctx)
    return ctx


def deltas(base: Path, merged: Path) -> dict[str, Any]:
    before = load_file(base / "model.safetensors")
    after = load_file(merged / "model.safetensors")
    return {name: after[name] - before[name] for name in before}


def by_peft(base: Path, adapters: list[Path], method: str, root: Path, **options: Any) -> dict[str, Any]:
    """What changes in the base when peft combines and merges; it takes one kind of scale at a time."""
    model = PeftModel.from_pretrained(load(base, "float32"), adapters[0], adapter_name="0")
    for number, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter, adapter_name=str(number))
    names = [str(number) for number in range(len(adapters))]
    model.add_weighted_adapter(names, WEIGHTS[: len(names)], "all", combination_type=method, **options)
    model.set_adapter("all")
    model.merge_and_unload(safe_merge=False).save_pretrained(root)
    return deltas(base, root)


@pytest.mark.parametrize("method", SEVERAL)
def test_each_method_is_what_peft_makes(
    method: str, tmp_path: Path, base: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # peft and we go through the modules in other orders, so what is dropped at random is dropped by size here.
    monkeypatch.setattr(
        merge_utils,
        "random_pruning",
        lambda tensor, density, rescale: merge_utils.magnitude_based_pruning(tensor, density) / density,
    )
    uses = CATALOG.merges[method].uses
    given = {name: value for name, value in (("density", 0.3), ("majority_sign_method", "frequency")) if name in uses}
    ctx = merged(tmp_path, base, adapters, method=method, proof_prompts=0, **given)
    ours = deltas(base, ctx.outputs[0][1])
    peft = by_peft(base, adapters, method, tmp_path / "peft", **given)
    largest = max(float(delta.abs().max()) for delta in peft.values())
    assert largest > 0.01
    for name, delta in peft.items():
        assert torch.allclose(ours[name], delta, atol=1e-4 * largest), name


@pytest.mark.parametrize("method", SEVERAL)
def test_each_method_ends_in_a_certificate(method: str, tmp_path: Path, base: Path, adapters: list[Path]) -> None:
    info = {f"adapters.{number}": {"name": f"a{number}", "artifact_id": f"art-{number}"} for number in range(3)}
    ctx = merged(tmp_path, base, adapters, info, method=method)
    certificate = json.loads((ctx.outputs[0][1] / "certificate.json").read_text())
    assert certificate["verdict"] == "passed"
    assert certificate["method"] == method
    assert certificate["retained"] > 0.99
    assert [entry["name"] for entry in certificate["adapter"]["combined"]] == ["a0", "a1", "a2"]
    assert [entry["weight"] for entry in certificate["adapter"]["combined"]] == WEIGHTS
    distance = certificate["adapter"]["distance_to_sum"]
    assert distance < 1e-5 if method == "cat" else distance > 1e-3
    assert certificate["adapter"]["ranks"] == ([8, 12] if method == "cat" else [4])


def test_the_one_that_names_another_base_is_pointed_at(tmp_path: Path, base: Path, adapters: list[Path]) -> None:
    other = shutil.copytree(adapters[1], tmp_path / "other")
    (other / "base_model.json").unlink(missing_ok=True)
    config = json.loads((other / "adapter_config.json").read_text()) | {"base_model_name_or_path": "org/elsewhere"}
    (other / "adapter_config.json").write_text(json.dumps(config))
    ctx = merged(tmp_path, base, [adapters[0], other], method="cat", proof_prompts=0, weights=[1.0, 1.0])
    warned = [event["adapter"] for event in ctx.events if event["code"] == "base_name_differs"]
    assert warned == ["adapters.1"]
    said = [entry["base"] for entry in ctx.results["certificate"]["adapter"]["combined"]]
    assert said[1] == {"name": "org/elsewhere", "weights": "unknown"}
    assert "base" not in ctx.results["certificate"]["adapter"]


def test_cat_is_the_sum_of_what_each_changes(tmp_path: Path, base: Path, adapters: list[Path]) -> None:
    ctx = merged(tmp_path, base, adapters, method="cat", proof_prompts=0)
    ours = deltas(base, ctx.outputs[0][1])
    for name in ours:
        total = torch.zeros_like(ours[name])
        for number, adapter in enumerate(adapters):
            model = PeftModel.from_pretrained(load(base, "float32"), adapter).merge_and_unload()
            total += WEIGHTS[number] * (model.state_dict()[name] - load_file(base / "model.safetensors")[name])
        assert torch.allclose(ours[name], total, atol=1e-5), name


def test_svd_of_the_whole_rank_is_exact_and_takes_any_ranks(tmp_path: Path, base: Path, adapters: list[Path]) -> None:
    other = make_adapter(tmp_path / "other", base, seed=9, r=2)
    pair = [adapters[0], other]
    exact = merged(tmp_path / "a", base, pair, method="svd", svd_rank=6, weights=[1.0, 1.0])
    assert exact.results["certificate"]["adapter"]["distance_to_sum"] < 1e-5
    short = merged(tmp_path / "b", base, pair, method="svd", svd_rank=3, weights=[1.0, 1.0])
    assert 0.01 < short.results["certificate"]["adapter"]["distance_to_sum"] < 1


def test_ranks_that_differ_are_refused_by_what_adds_factors(tmp_path: Path, base: Path, adapters: list[Path]) -> None:
    other = make_adapter(tmp_path / "other", base, seed=9, r=2)
    with pytest.raises(RunError, match=r"q_proj has ranks 2, 4|_proj has ranks 2, 4") as caught:
        merged(tmp_path / "a", base, [adapters[0], other], method="linear", weights=[1.0, 1.0])
    assert caught.value.code == Code.ADAPTER_INVALID
    assert "cat" in (caught.value.hint or "")


def test_the_seed_says_what_is_dropped(tmp_path: Path, base: Path, adapters: list[Path]) -> None:
    found = [
        merged(tmp_path / str(number), base, adapters, method="dare_linear", density=0.5, seed=seed)
        for number, seed in enumerate([1, 1, 2])
    ]
    one, same, other = (ctx.results["certificate"]["merged"]["sha256"] for ctx in found)
    assert one == same != other


@pytest.mark.parametrize("peft", [{"use_dora": True}, {"modules_to_save": ["norm"]}])
def test_what_is_no_plain_lora_is_refused(
    peft: dict[str, Any], tmp_path: Path, base: Path, adapters: list[Path]
) -> None:
    other = make_adapter(tmp_path / "other", base, seed=9, **peft)
    with pytest.raises(RunError, match="cannot be combined: adapter 2 holds") as caught:
        merged(tmp_path / "a", base, [adapters[0], other], method="cat", weights=[1.0, 1.0])
    assert caught.value.param == "adapters"


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, base: Path, adapters: list[Path]) -> None:
    sibling = make_model(tmp_path / "sibling", seed=1)
    mine, theirs = (shutil.copytree(adapters[0], tmp_path / name) for name in ("mine", "theirs"))
    write_base_record(mine, base, "base")
    write_base_record(theirs, sibling, "sibling")
    with pytest.raises(RunError, match=r"adapters\.1: .*trained on sibling") as caught:
        merged(tmp_path / "a", base, [mine, theirs], method="linear", weights=[1.0, 1.0])
    assert (caught.value.code, caught.value.param) == (Code.BASE_MISMATCH, "adapters.1")


def test_tokenizers_that_differ_leave_the_base_s(tmp_path: Path, base: Path, adapters: list[Path]) -> None:
    pair = [shutil.copytree(adapter, tmp_path / adapter.name) for adapter in adapters[:2]]
    for number, folder in enumerate(pair):
        for file in base.glob("tokenizer*"):
            shutil.copyfile(file, folder / file.name)
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}" + "!" * number)
    ctx = merged(tmp_path / "a", base, pair, method="cat", weights=[1.0, 1.0])
    assert "tokenizers_differ" in [event["code"] for event in ctx.events]
    assert not (ctx.outputs[0][1] / "chat_template.jinja").exists() or (
        (ctx.outputs[0][1] / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()
    )
    assert tensor_headers(ctx.outputs[0][1])
