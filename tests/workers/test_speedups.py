"""Optimizers and kernels: what this machine cannot run is refused with the reason, and what it runs is what was named.

Without a GPU the choices made for one are tested; the kernels themselves are not.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import DPOConfig, SFTConfig

from app.catalog import Interrupted
from app.errors import Code, RunError
from app.specs import ModelBlock, TrainingBlock
from tests.workers.context import RecordingContext
from tests.workers.test_sft import ALL_LINEAR, context, sha256, spec
from workers import ladder
from workers.loading import speedups
from workers.loading.devices import Compute
from workers.loading.speedups import attention, speed_arguments
from workers.recipes.sft import run

CPU, GPU = Compute("cpu", "float32"), Compute("cuda", "bfloat16")
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs these")


def block(**fields: Any) -> TrainingBlock:
    return TrainingBlock.model_validate(fields)


def model(**fields: Any) -> ModelBlock:
    return ModelBlock.model_validate({"model_name_or_path": "x", **fields})


@on_a_cpu
@pytest.mark.parametrize(
    ("training", "field", "why"),
    [
        ({"optim": "paged_adamw_8bit"}, "training.optim", "paged_adamw_8bit pages a GPU's memory"),
        ({"optim": "paged_adamw_32bit"}, "training.optim", "pages a GPU's memory"),
        ({"torch_compile": True}, "training.torch_compile", "compiled for a GPU"),
        ({"activation_offloading": True}, "training.activation_offloading", "moved off a GPU"),
        ({"use_liger_kernel": True}, "training.use_liger_kernel", "for a GPU"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(
    training: dict[str, Any], field: str, why: str, tmp_path: Path, tiny: Path, numbers: Path
) -> None:
    with pytest.raises(RunError, match=why) as caught:
        run(spec(max_steps=1, **training), context(tmp_path, tiny, numbers))
    assert (caught.value.code, caught.value.param) == (Code.BAD_SPEC, field)
    assert caught.value.hint


@on_a_cpu
def test_flash_attention_is_refused_without_a_gpu(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    with pytest.raises(RunError, match="flash attention is for a GPU") as caught:
        run(spec(model={"attn_implementation": "flash_attention_2"}), context(tmp_path, tiny, numbers))
    assert caught.value.param == "model.attn_implementation"


def test_attention_by_name_learns_the_same(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    losses = []
    for name in ("auto", "sdpa", "eager"):
        ctx = context(tmp_path / name, tiny, numbers)
        run(spec(model={"attn_implementation": name, "peft_config": {"lora_dropout": 0.0}}, max_steps=3), ctx)
        losses.append(ctx.losses)
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)


@pytest.mark.parametrize(
    ("installed", "fields", "compute", "expected"),
    [
        (True, {}, GPU, "flash_attention_2"),
        (False, {}, GPU, None),
        (True, {}, CPU, None),
        (True, {}, Compute("cuda", "float32"), None),
        (True, {"use_peft": False}, GPU, None),
        (True, {"attn_implementation": "sdpa"}, GPU, "sdpa"),
        (True, {"attn_implementation": "flash_attention_2"}, GPU, "flash_attention_2"),
        (False, {"attn_implementation": "flash_attention_2"}, GPU, "not installed"),
        (True, {"attn_implementation": "flash_attention_2", "use_peft": False}, GPU, "16 bits"),
    ],
)
def test_which_attention_is_taken(
    installed: bool,
    fields: dict[str, Any],
    compute: Compute,
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speedups, "find_spec", lambda name: object() if installed else None)
    ctx = RecordingContext(tmp_path)
    if expected in ("not installed", "16 bits"):
        with pytest.raises(RunError, match=expected):
            attention(model(**fields), compute, ctx)
        return
    assert attention(model(**fields), compute, ctx) == expected
    chosen = not fields and expected is not None
    assert ctx.resolutions == ({"model.attn_implementation": expected} if chosen else {})


def test_liger_is_taken_by_itself_where_it_computes_the_same_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def liger(config: Any, compute: Compute, asked: Any = "auto") -> Any:
        settings = block(use_liger_kernel=asked)
        return speed_arguments(config, settings, compute, RecordingContext(tmp_path))["use_liger_kernel"]

    monkeypatch.setattr(speedups, "find_spec", lambda name: object())
    assert liger(SFTConfig, GPU) is True
    assert liger(DPOConfig, GPU) is False
    assert liger(DPOConfig, GPU, True) is True
    assert liger(SFTConfig, GPU, False) is False
    assert liger(SFTConfig, CPU) is False
    monkeypatch.setattr(speedups, "find_spec", lambda name: None)
    assert liger(SFTConfig, GPU) is False
    with pytest.raises(RunError, match="not installed"):
        liger(SFTConfig, GPU, True)


def test_on_a_gpu_what_is_named_is_handed_on(tmp_path: Path) -> None:
    asked = block(optim="paged_adamw_8bit", torch_compile=True, activation_offloading=True, use_liger_kernel=False)
    found = speed_arguments(SFTConfig, asked, GPU, RecordingContext(tmp_path))
    assert found == {
        "optim": "paged_adamw_8bit",
        "torch_compile": True,
        "activation_offloading": True,
        "use_liger_kernel": False,
    }


def moments(checkpoint: Path) -> set[tuple[str, torch.dtype]]:
    """Names and dtypes of what an optimizer keeps; bitsandbytes puts its own one level deeper."""
    found: set[tuple[str, torch.dtype]] = set()
    for one in torch.load(checkpoint / "optimizer.pt", weights_only=False)["state"].values():
        for part in (one, *(value for value in one.values() if isinstance(value, dict))):
            found |= {(name, value.dtype) for name, value in part.items() if isinstance(value, torch.Tensor)}
    return found


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "adafactor", "sgd"])
def test_the_optimizer_that_is_named_is_the_one_that_steps(
    optim: str, tmp_path: Path, tiny: Path, numbers: Path
) -> None:
    ctx = context(tmp_path, tiny, numbers)
    rate = 1.0 if optim == "sgd" else 1e-2
    run(spec(model=ALL_LINEAR, optim=optim, learning_rate=rate), ctx)
    assert sum(ctx.losses[-3:]) < 0.97 * sum(ctx.losses[:3])
    names = {name for name, _ in moments(ctx.checkpoints[-1][0])}
    assert ("exp_avg" in names) == (optim == "adamw_torch")
    assert ("exp_avg_sq_row" in names) == (optim == "adafactor")
    assert ("state1" in names) == (optim == "adamw_8bit")


def test_a_run_with_moments_in_bytes_is_exact_to_resume(tmp_path: Path, numbers: Path, tiny: Path) -> None:
    settings = {"optim": "adamw_8bit", "max_steps": 6}
    full = {"use_peft": False}  # its embeddings are large enough to be kept in bytes
    whole, first, second = (context(tmp_path / name, tiny, numbers) for name in ("whole", "first", "second"))
    run(spec(model=full, **settings), whole)
    first.stop_after = 3
    with pytest.raises(Interrupted):
        run(spec(model=full, **settings), first)
    # Small tensors keep float32; of 4096 numbers and more the moments are bytes.
    assert {kind for name, kind in moments(first.checkpoints[-1][0]) if name == "state1"} == {
        torch.float32,
        torch.uint8,
    }
    second.resume_from = first.checkpoints[-1][0]
    run(spec(model=full, **settings), second)
    assert sha256(second.folder / "model.safetensors") == sha256(whole.folder / "model.safetensors")


def test_the_last_rung_on_a_gpu_moves_activations_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    last = spec(per_device_train_batch_size=1, gradient_checkpointing=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rung = ladder.next_rung(last)
    assert rung is not None
    assert rung.values == {"training.activation_offloading": True}
    assert ladder.read_rung(rung._asdict()) == rung
    assert ladder.next_rung(type(last).model_validate(ladder.changed(last.model_dump(), rung.values))) is None
