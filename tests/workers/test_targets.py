"""The table of architectures, against the models that transformers builds."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from app import fit
from app.targets import ALL_LINEAR, FAMILIES, ends, spelt_out
from workers.loading.fresh import shapes_of

# What their default configurations lack, or have too much of to be built in a moment.
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
MORE: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "nemotron": {"num_key_value_heads": 8, "num_attention_heads": 8, "hidden_size": 64, "head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def build(kind: str) -> Any:
    """The architecture with two layers, on the meta device."""
    config = AutoConfig.for_model(kind)
    for name in DEPTH:
        if hasattr(config, name):
            setattr(config, name, 2)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    for name, value in MORE.get(kind, {}).items():
        setattr(config, name, value)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # GPT-BigCode, when it is imported
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_name_in_the_table_is_a_linear_module_of_the_architecture(kind: str) -> None:
    model, family = build(kind), FAMILIES[kind]
    shapes = shapes_of(model)
    head = model.get_output_embeddings()
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }
    full = spelt_out("full", family, fit.linear_modules(shapes))
    for name in full.modules:
        assert any(ends(path, name) for path in linear), f"{kind} has no {name}"
    for name in full.parameters:
        found = [shape for path, shape in shapes.items() if ends(path, name)]
        assert found, f"{kind} has no {name}"
        assert all(len(shape) == 3 for shape in found)
    assert any(isinstance(module, Conv1D) for module in linear.values()) == family.transposed
    # full leaves out routers and gates alone; nothing that the table forgot.
    left = {path.rpartition(".")[2] for path in linear if not any(ends(path, name) for name in full.modules)}
    assert left <= {"router", "shared_expert_gate", "in_proj"} | ({"out_proj"} if kind == "lfm2" else set())
    parameters = {path for path, shape in shapes.items() if len(shape) == 3 and "conv" not in path}
    assert all(any(ends(path, name) for name in full.parameters) for path in parameters)


def test_the_three_presets_hold_each_other() -> None:
    for family in FAMILIES.values():
        minimal, standard, full = (set(spelt_out(preset, family).modules) for preset in ("minimal", "standard", "full"))
        assert minimal <= standard <= full
        assert spelt_out(ALL_LINEAR, family) == spelt_out("full", family)
