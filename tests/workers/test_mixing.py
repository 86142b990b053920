"""Whole models as one: each method against its definition on whole tensors, proved, and refused where it cannot be."""

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.catalog import Interrupted
from app.discovery import discover
from app.errors import Code, RunError
from tests.workers.conftest import make_model
from tests.workers.context import RecordingContext
from workers.loading import MergeSpec, Mixture, Part, mixed, threshold
from workers.merges import model_soup
from workers.operations.merge import run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CATALOG = discover(["workers.merges"])
METHODS = sorted(name for name, method in CATALOG.merges.items() if "models" in method.takes)
WEIGHTS = [0.5, 1.5, -0.25]
Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("mixing") / "base")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, base: Path) -> list[Path]:
    """Three that went their own ways from the base."""
    root = tmp_path_factory.mktemp("models")
    return [moved(base, root / str(number), number) for number in range(3)]


def moved(base: Path, folder: Path, seed: int, size: float = 0.05) -> Path:
    shutil.copytree(base, folder)
    torch.manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    changed = {name: (tensor + torch.randn_like(tensor) * size).to(tensor.dtype) for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def merged(root: Path, models: Sequence[Path], base: Path | None, **fields: Any) -> RecordingContext:
    inputs = {f"models.{number}": model for number, model in enumerate(models)}
    given: dict[str, Any] = {"models": [f"artifact:{number}" for number in range(len(models))], **fields}
    if base is not None:
        inputs["base_model"] = base
        given["base_model"] = "artifact:base"
    ctx = RecordingContext(root, inputs, catalog=CATALOG)
    run(MergeSpec.model_validate(given), ctx)
    return ctx


def tensors_of(folder: Path) -> Tensors:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def soup(models: list[Any], base: Any) -> Any:
    return sum(weight * model for weight, model in zip(WEIGHTS, models, strict=True)) / sum(WEIGHTS)


def task_arithmetic(models: list[Any], base: Any) -> Any:
    return base + sum(weight * (model - base) for weight, model in zip(WEIGHTS, models, strict=True))


def slerp(models: list[Any], base: Any, t: float = 0.3) -> Any:
    one, other = models
    cosine = float((one * other).sum() / (one.norm() * other.norm()))
    if abs(cosine) > 0.9995:
        return (1 - t) * one + t * other
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * other) / math.sin(angle)


def ties(models: list[Any], base: Any, density: float = 0.3) -> Any:
    """Trim by sorting, elect by the weighted sum, mean by weight of those that agree."""
    deltas = []
    for model in models:
        delta = (model - base).flatten()
        kept = delta.abs().argsort(descending=True)[: max(1, int(density * delta.numel()))]
        trimmed = torch.zeros_like(delta)
        trimmed[kept] = delta[kept]
        deltas.append(trimmed.view(base.shape))
    sign = torch.where(sum(w * d for w, d in zip(WEIGHTS, deltas, strict=True)) >= 0, 1.0, -1.0)
    total, share = torch.zeros_like(base), torch.zeros_like(base)
    for weight, delta in zip(WEIGHTS, deltas, strict=True):
        agrees = (weight * delta).sign() == sign
        total += torch.where(agrees, weight * delta, torch.zeros_like(delta))
        share += torch.where(agrees, torch.full_like(delta, weight), torch.zeros_like(delta))
    return base + total / torch.where(share == 0, torch.ones_like(share), share)


@pytest.mark.parametrize(
    ("method", "definition", "fields"),
    [
        ("model_soup", soup, {"weights": WEIGHTS}),
        ("task_arithmetic", task_arithmetic, {"weights": WEIGHTS}),
        ("ties", ties, {"weights": WEIGHTS, "density": 0.3}),
        ("slerp", slerp, {"t": 0.3}),
    ],
)
def test_each_method_is_its_definition(
    method: str,
    definition: Callable[..., Any],
    fields: dict[str, Any],
    tmp_path: Path,
    base: Path,
    models: list[Path],
) -> None:
    based = "base_model" in CATALOG.merges[method].uses
    chosen = models[: CATALOG.merges[method].exactly]
    ctx = merged(tmp_path, chosen, base if based else None, method=method, **fields)
    found, before = tensors_of(ctx.outputs[0][1]), tensors_of(base)
    given = [tensors_of(model) for model in chosen]
    for name, tensor in found.items():
        expected = definition([own[name].double() for own in given], before[name].double())
        assert torch.allclose(tensor.double(), expected, rtol=1e-5, atol=1e-6), name
        assert not torch.equal(tensor, given[0][name])


def test_dare_drops_a_share_and_grows_the_rest(tmp_path: Path, base: Path, models: list[Path]) -> None:
    """Of one model with itself at half weight: each change is gone or divided by the density."""
    ctx = merged(tmp_path, [models[0], models[0]], base, method="dare_ties", density=0.25, weights=[1.0, 1e-9])
    before, one, found = (tensors_of(folder) for folder in (base, models[0], ctx.outputs[0][1]))
    name = "model.embed_tokens.weight"
    change, delta = found[name] - before[name], one[name] - before[name]
    dropped = change.abs() < 1e-4 * delta.abs() + 1e-7
    kept = torch.isclose(change, delta / 0.25, rtol=1e-3, atol=1e-5)
    # Where the first was dropped, the second is alone and its share is all of the weight.
    assert bool((dropped | kept).all())
    share = float(kept.float().mean())
    assert 0.4 < share < 0.48  # 1 − 0.75²


@pytest.mark.parametrize("method", METHODS)
def test_each_method_ends_in_a_certificate_and_loads(
    method: str, tmp_path: Path, base: Path, models: list[Path]
) -> None:
    plug = CATALOG.merges[method]
    chosen = models[: plug.exactly]
    ctx = merged(tmp_path, chosen, base if "base_model" in plug.uses else None, method=method)
    folder = ctx.outputs[0][1]
    certificate = json.loads((folder / "certificate.json").read_text())
    assert certificate["verdict"] == "passed"
    assert certificate["bytes"]["false"] == []
    assert certificate["changed_tensors"] == len(tensors_of(base))
    assert len(certificate["models"]) == len(certificate["distances"]) == len(chosen)
    assert all(0 < entry["kl"] < 10 for entry in certificate["distances"])
    assert (certificate["base"] is None) == ("base_model" not in plug.uses)
    assert (folder / "tokenizer.json").read_bytes() == (models[0] / "tokenizer.json").read_bytes()
    assert ctx.hashed.keys() == {folder / "model.safetensors"}


@pytest.mark.parametrize("method", METHODS)
def test_the_same_spec_gives_the_same_bytes(method: str, tmp_path: Path, base: Path, models: list[Path]) -> None:
    plug = CATALOG.merges[method]
    before = base if "base_model" in plug.uses else None
    runs = [
        merged(tmp_path / str(number), models[:2], before, method=method, proof_prompts=0, seed=7)
        for number in range(2)
    ]
    one, other = (ctx.results["certificate"]["merged"]["sha256"] for ctx in runs)
    assert one == other


def test_an_interrupted_mix_goes_on_with_its_shards(
    tmp_path: Path, base: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = MergeSpec.model_validate({"models": ["artifact:0", "artifact:1"], "method": "model_soup"})
    small = MergeSpec.model_construct(**spec.__dict__ | {"max_shard_size": 60_000})
    inputs = {f"models.{number}": model for number, model in enumerate(models[:2])}
    ctx = RecordingContext(tmp_path, inputs, catalog=CATALOG)
    blend = model_soup._blend

    def slow(part: Part) -> Any:
        time.sleep(0.05)
        return blend(part)

    with monkeypatch.context() as patch:
        patch.setattr(model_soup, "_blend", slow)
        patch.setattr(ctx, "stop_requested", lambda: any(ctx.kept_dir.glob("*.safetensors.json")))
        with pytest.raises(Interrupted):
            run(small, ctx)
    left = {path.name: path.stat().st_ino for path in ctx.kept_dir.glob("*.safetensors")}
    assert left
    again = RecordingContext(tmp_path / "again", inputs, catalog=CATALOG)
    again.kept_dir = ctx.kept_dir
    run(small, again)
    whole = merged(tmp_path / "whole", models[:2], None, method="model_soup")
    assert tensors_of(again.outputs[-1][1]).keys() == tensors_of(whole.outputs[0][1]).keys()
    for name, tensor in tensors_of(whole.outputs[0][1]).items():
        assert torch.equal(tensor, tensors_of(again.outputs[-1][1])[name])
    for name, inode in left.items():
        assert (again.outputs[-1][1] / name).stat().st_ino == inode


@pytest.mark.parametrize("defect", ["a value", "a tensor", "another model"])
def test_a_broken_mix_is_caught(
    defect: str, tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = mixed.write_merge, mixed.read_mix

    def careless(merge: Any, folder: Path, *rest: Any, **named: Any) -> Any:
        digests = write(merge, folder, *rest, **named)
        tensors = load_file(folder / "model.safetensors")
        if defect == "a value":
            tensors["model.norm.weight"][3] += 1e-6
        elif defect == "a tensor":
            del tensors["model.norm.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return digests

    if defect == "another model":
        # What is written comes of other models than what is proved.
        wrong = read([models[0], models[2]], None, Mixture(_first_and_other), _spec(), None)
        monkeypatch.setattr(mixed, "write_merge", lambda merge, *rest, **named: write(wrong, *rest, **named))
    else:
        monkeypatch.setattr(mixed, "write_merge", careless)
    with pytest.raises(RunError, match="not what the models give") as caught:
        merged(tmp_path, models[:2], None, method="model_soup")
    assert caught.value.code == Code.VALIDATION_FAILED


def _spec() -> MergeSpec:
    return MergeSpec.model_validate({"models": ["a", "b"], "method": "model_soup"})


def test_models_of_other_shapes_are_refused(tmp_path: Path, base: Path, models: list[Path]) -> None:
    wide = make_model(tmp_path / "wide", intermediate_size=96)
    with pytest.raises(RunError, match=r"models\.1: model\.layers\.0\.mlp\.[\w.]+ is") as caught:
        merged(tmp_path / "a", [models[0], wide], None, method="model_soup")
    assert (caught.value.code, caught.value.param) == (Code.BASE_MISMATCH, "models.1")
    other = make_model(tmp_path / "qwen", architecture="qwen2")
    with pytest.raises(RunError, match=r"base_model: it is a qwen2, and the first model a llama"):
        merged(tmp_path / "b", models[:2], other, method="task_arithmetic")


def test_an_overflow_is_named(tmp_path: Path, models: list[Path]) -> None:
    huge = shutil.copytree(models[0], tmp_path / "huge")
    tensors = load_file(huge / "model.safetensors")
    tensors["model.norm.weight"][0] = 3e5
    save_file(tensors, huge / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="too large for float16") as caught:
        merged(tmp_path / "a", [huge, models[1]], None, method="model_soup", torch_dtype="float16")
    assert caught.value.code == Code.NON_FINITE_WEIGHTS
    assert "float32" in (caught.value.hint or "")


@pytest.mark.parametrize("count", [1, 7, 500, 999, 1000])
@pytest.mark.parametrize("kind", ["random", "equal", "zeros", "tiny"])
def test_a_threshold_is_the_value_at_its_rank(kind: str, count: int) -> None:
    torch.manual_seed(count)
    values = {
        "random": torch.randn(1000),
        "equal": torch.ones(1000),
        "zeros": torch.cat([torch.zeros(990), torch.ones(10)]),
        "tiny": torch.randn(1000) * 1e-40,
    }[kind].abs()
    expected = float(values.sort(descending=True).values[count - 1])
    assert threshold(lambda: iter(values.split(333)), count) == expected


def _first_and_other(part: Part) -> Any:
    return (part.models[0] + part.models[1]) / 2
