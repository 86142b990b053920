"""Validation names everything that is wrong with a model, and passes one that works."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.errors import Code, RunError
from tests.guide import BLOCKS, needs_guide
from tests.workers.context import RecordingContext
from workers.operations.validate import MAX_NEW_TOKENS, PROMPT, ValidateSpec, run
from workers.recipes import sft


def validate(root: Path, folder: Path, base: Path | None = None) -> RecordingContext:
    ctx = RecordingContext(root, {"model": folder, **({"base_model": base} if base else {})})
    try:
        run(ValidateSpec(model="artifact:art-m"), ctx)
    except RunError as error:
        ctx.results["error"] = error
    return ctx


def status(ctx: RecordingContext) -> dict[str, str]:
    return {check["name"]: check["status"] for check in ctx.results["report"]["checks"]}


def with_nan(source: Path, target: Path, name: str) -> Path:
    folder = shutil.copytree(source, target)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_model_that_works_passes_every_check(tmp_path: Path, tiny: Path) -> None:
    ctx = validate(tmp_path, tiny)
    assert "error" not in ctx.results
    assert set(status(ctx).values()) == {"ok"}
    assert ctx.results["report"]["ok"]
    assert isinstance(ctx.results["report"]["answer"], str)
    assert ctx.resolutions == {}, "the spec has no field for it, so a second attempt could not read it"


def test_it_answers_the_guides_prompt_greedily(tmp_path: Path, tiny: Path) -> None:
    report = validate(tmp_path, tiny).results["report"]
    assert report["prompt"] == "你好，请介绍一下自己。"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    asked = [{"role": "user", "content": report["prompt"]}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    assert report["answer"] == tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@needs_guide
def test_the_prompt_stands_in_the_guide() -> None:
    assert f'input_text = "{PROMPT}"' in BLOCKS[11]


def test_an_adapter_is_validated_on_its_base(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    spec: Any = {"model": {"model_name_or_path": "t"}, "dataset": {"file": "f"}, "training": {"max_steps": 1}}
    trained = RecordingContext(tmp_path / "sft", {"model.model_name_or_path": tiny, "dataset.file": numbers})
    sft.run(sft.SftSpec.model_validate(spec), trained)
    ctx = validate(tmp_path, trained.folder, tiny)
    assert ctx.results["report"]["kind"] == "adapter"
    assert ctx.results["report"]["ok"]


def test_weights_that_are_not_finite_fail(tmp_path: Path, tiny: Path) -> None:
    ctx = validate(tmp_path, with_nan(tiny, tmp_path / "bad", "model.layers.0.self_attn.q_proj.weight"))
    error = ctx.results["error"]
    assert error.code == Code.VALIDATION_FAILED
    assert "model.layers.0.self_attn.q_proj.weight" in error.message
    assert (status(ctx)["finite_weights"], status(ctx)["finite_logits"]) == ("failed", "failed")


def test_a_missing_tokenizer_fails_and_the_rest_is_still_checked(tmp_path: Path, tiny: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "bad", ignore=shutil.ignore_patterns("tokenizer*"))
    ctx = validate(tmp_path, folder)
    assert "tokenizer" in ctx.results["error"].message
    assert status(ctx) == {"tokenizer": "failed", "finite_weights": "ok", "loads": "ok"}


def test_missing_weights_and_missing_tensors_fail(tmp_path: Path, tiny: Path) -> None:
    empty = shutil.copytree(tiny, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    assert status(validate(tmp_path / "1", empty))["weights"] == "failed"
    cut = shutil.copytree(tiny, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:5000])
    assert status(validate(tmp_path / "2", cut))["weights"] == "failed"


def test_a_tokenizer_larger_than_the_model_fails(tmp_path: Path, tiny: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "bad")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([PROMPT])
    tokenizer.save_pretrained(folder)
    assert status(validate(tmp_path, folder))["vocabulary"] == "failed"


def test_a_missing_chat_template_is_only_a_warning(tmp_path: Path, tiny: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "plain", ignore=shutil.ignore_patterns("chat_template*"))
    ctx = validate(tmp_path, folder)
    assert "error" not in ctx.results
    assert status(ctx)["chat_template"] == "warn"
