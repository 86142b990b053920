"""Whether an adapter fits a base, by config and shapes alone: presets by architecture, and what is refused."""

from typing import Any

import pytest

from app import fit
from app.peft import PeftBlock
from app.targets import family_of, spelt_out

LAYER = "model.layers.0"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA = {
    "model.embed_tokens.weight": [400, 64],
    **{f"{LAYER}.self_attn.{name}.weight": [64, 64] for name in ATTENTION},
    **{f"{LAYER}.mlp.{name}.weight": [128, 64] for name in ("gate_proj", "up_proj", "down_proj")},
    f"{LAYER}.input_layernorm.weight": [64],
    "model.norm.weight": [64],
    "lm_head.weight": [400, 64],
}
PHI3 = {
    "model.embed_tokens.weight": [400, 64],
    f"{LAYER}.self_attn.qkv_proj.weight": [192, 64],
    f"{LAYER}.self_attn.o_proj.weight": [64, 64],
    f"{LAYER}.mlp.gate_up_proj.weight": [256, 64],
    f"{LAYER}.mlp.down_proj.weight": [64, 128],
}
GPT2 = {
    "wte.weight": [400, 64],
    "h.0.attn.c_attn.weight": [64, 192],
    "h.0.attn.c_proj.weight": [64, 64],
    "h.0.mlp.c_fc.weight": [64, 256],
    "h.0.mlp.c_proj.weight": [256, 64],
}
QWEN_MOE = {
    "model.embed_tokens.weight": [400, 64],
    **{f"{LAYER}.self_attn.{name}.weight": [64, 64] for name in ATTENTION},
    **{f"{LAYER}.mlp.experts.{n}.{name}.weight": [32, 64] for n in range(2) for name in ("gate_proj", "up_proj")},
    **{f"{LAYER}.mlp.experts.{n}.down_proj.weight": [64, 32] for n in range(2)},
    f"{LAYER}.mlp.gate.weight": [2, 64],
}


def misfit(
    peft: dict[str, Any], shapes: dict[str, list[int]] = LLAMA, kind: str = "llama", *, quantised: bool = False
) -> fit.Misfit | None:
    return fit.misfit(PeftBlock.model_validate(peft), {"model_type": kind}, shapes, quantised=quantised)


@pytest.mark.parametrize(
    ("kind", "shapes", "preset", "modules", "parameters"),
    [
        ("llama", LLAMA, "minimal", ("q_proj", "v_proj"), ()),
        ("llama", LLAMA, "full", (*ATTENTION, "gate_proj", "up_proj", "down_proj"), ()),
        ("phi3", PHI3, "minimal", ("qkv_proj",), ()),
        ("phi3", PHI3, "full", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), ()),
        ("gpt2", GPT2, "standard", ("c_attn", "attn.c_proj"), ()),
        ("gpt2", GPT2, "full", ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"), ()),
        ("qwen3_moe", QWEN_MOE, "standard", ATTENTION, ()),
        ("qwen3_moe", QWEN_MOE, "full", ATTENTION, ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
        ("qwen3_moe", QWEN_MOE, "all-linear", ATTENTION, ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
        ("brand_new", LLAMA, "standard", ATTENTION, ()),
        ("brand_new", PHI3, "standard", ("qkv_proj", "o_proj"), ()),
    ],
)
def test_a_preset_means_the_modules_that_the_architecture_has(
    kind: str, shapes: dict[str, list[int]], preset: str, modules: tuple[str, ...], parameters: tuple[str, ...]
) -> None:
    targets = fit.targets_of(PeftBlock(target_modules=preset), {"model_type": kind}, shapes)
    assert targets == (modules, parameters)


def test_all_linear_is_left_to_peft_where_there_are_no_experts() -> None:
    assert fit.targets_of(PeftBlock(target_modules="all-linear"), {"model_type": "llama"}, LLAMA) == ((), ())


def test_the_language_model_within_a_larger_one_is_what_counts() -> None:
    family = family_of({"model_type": "some_vision_thing", "text_config": {"model_type": "phi3"}})
    assert family is not None
    assert spelt_out("minimal", family).modules == ("qkv_proj",)


@pytest.mark.parametrize(
    ("peft", "shapes", "kind", "quantised", "field", "words"),
    [
        ({"target_modules": ["query"]}, LLAMA, "llama", False, "target_modules", "no linear module named query"),
        ({"target_modules": ["input_layernorm"]}, LLAMA, "llama", False, "target_modules", "input_layernorm"),
        ({"target_modules": ["lm_head"]}, LLAMA, "llama", False, "target_modules", "the output head"),
        ({"target_modules": ["embed_tokens"]}, LLAMA, "llama", False, "target_modules", "an embedding"),
        ({"target_modules": ["gate_proj"]}, QWEN_MOE, "qwen3_moe", False, "target_modules", "gate_proj"),
        ({}, {"a.weight": [2, 2]}, "brand_new", False, "target_modules", "not known for this architecture (brand_new)"),
        ({"target_modules": "full"}, QWEN_MOE, "qwen3_moe", False, "lora_dropout", "without dropout"),
        ({"target_modules": "full", "lora_dropout": 0.0, "use_dora": True}, QWEN_MOE, "mixtral", False, "use_dora", ""),
        (
            {"target_modules": "full", "lora_dropout": 0.0, "init_lora_weights": "pissa"},
            *(QWEN_MOE, "qwen3_moe", False, "init_lora_weights", "pissa"),
        ),
        ({"rank_pattern": {"up_proj": 4}}, LLAMA, "llama", False, "rank_pattern", "none of the modules that are"),
        ({"alpha_pattern": {"layers.7.self_attn.q_proj": 4}}, LLAMA, "llama", False, "alpha_pattern", "layers.7"),
        ({"init_lora_weights": "pissa", "r": 65}, LLAMA, "llama", False, "r", "which has 64"),
        ({"init_lora_weights": "olora", "rank_pattern": {"v_proj": 80}}, LLAMA, "llama", False, "r", "80 directions"),
        ({"init_lora_weights": "olora"}, GPT2, "gpt2", False, "init_lora_weights", "(in, out)"),
        ({"modules_to_save": ["nothing"]}, LLAMA, "llama", False, "modules_to_save", "no module named nothing"),
        ({"modules_to_save": ["norm"]}, LLAMA, "llama", False, "modules_to_save", "would also take"),
        ({"modules_to_save": ["q_proj"]}, LLAMA, "llama", False, "modules_to_save", "trained whole and get an adapter"),
        ({"modules_to_save": ["self_attn"]}, LLAMA, "llama", False, "modules_to_save", "q_proj would be"),
        ({"modules_to_save": ["up_proj"]}, LLAMA, "llama", True, "modules_to_save", "stored in 4 bit"),
    ],
)
def test_what_does_not_fit_is_named_with_its_field(
    peft: dict[str, Any], shapes: dict[str, list[int]], kind: str, quantised: bool, field: str, words: str
) -> None:
    fault = misfit(peft, shapes, kind, quantised=quantised)
    assert fault is not None
    assert fault.field == field
    assert words in fault.message
    assert fault.hint


@pytest.mark.parametrize(
    "peft",
    [
        {},
        {"target_modules": "all-linear", "use_dora": True, "rank_pattern": {"layers.0.mlp.up_proj": 4}},
        {"init_lora_weights": "pissa_niter_4", "r": 64},
        {"modules_to_save": ["model.norm", "embed_tokens", "lm_head"]},
        {"modules_to_save": ["up_proj"]},
    ],
)
def test_what_fits_is_let_through(peft: dict[str, Any]) -> None:
    assert misfit(peft) is None


def test_a_tied_head_that_is_not_stored_can_be_trained_whole() -> None:
    tied = {name: shape for name, shape in LLAMA.items() if name != "lm_head.weight"}
    assert misfit({"modules_to_save": ["lm_head"]}, tied) is None


def test_the_longest_name_decides_on_a_rank() -> None:
    pattern = {"q_proj": 4, "layers.0.self_attn.q_proj": 32, "v_proj": 2}
    assert fit.by_pattern(pattern, "model.layers.0.self_attn.q_proj", 16) == 32
    assert fit.by_pattern(pattern, "model.layers.10.self_attn.q_proj", 16) == 4
    assert fit.by_pattern(pattern, "model.layers.0.self_attn.o_proj", 16) == 16
