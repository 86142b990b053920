"""Products on the CPU: quick ways compute what the plain ones do, forth and back, and equal runs stay equal."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from workers.loading import products
from workers.loading.devices import Compute

FLOAT = Compute("cpu", "float32")


def model(**lora: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=not lora,
    )
    plain = LlamaForCausalLM(config)
    if not lora:
        return plain
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "init_lora_weights": False,
    }
    return get_peft_model(plain, LoraConfig(**settings | lora, task_type="CAUSAL_LM"))


def step(tuned: Any) -> tuple[Any, dict[str, Any]]:
    """Logits, and the gradient of every trained weight."""
    torch.manual_seed(1)  # dropout
    ids = torch.randint(0, 128, (3, 11), generator=torch.Generator().manual_seed(2))
    out = tuned(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}


@pytest.fixture(params=[False, True], ids=["as it is here", "oneDNN"])
def everywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, whatever this machine is; oneDNN computes anywhere."""
    if request.param:
        monkeypatch.setattr(products, "wide_only_in_onednn", lambda: True)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        {"lora_dropout": 0.5},
        {"bias": "all"},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    ],
    ids=["full", "all", "some", "dropout", "bias", "dora", "saved head"],
)
def test_quick_layers_give_the_logits_and_gradients_of_plain_ones(lora: dict[str, Any]) -> None:
    plain = model(**lora)
    quick = products.quicken(copy.deepcopy(plain), FLOAT)
    logits, gradients = step(plain.train())
    quick_logits, quick_gradients = step(quick.train())
    assert torch.allclose(quick_logits, logits, atol=1e-5)
    assert quick_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(quick_gradients[name], gradient, atol=1e-5), name


@pytest.mark.usefixtures("everywhere")
def test_a_switched_off_adapter_is_the_base_and_a_second_one_is_itself() -> None:
    plain = model(lora_dropout=0.1)
    plain.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    quick = products.quicken(copy.deepcopy(plain), FLOAT)
    ids = torch.arange(12)[None]
    seen = []
    with torch.no_grad():
        for tuned in (plain.eval(), quick.eval()):
            tuned.set_adapter("default")
            found = [tuned(ids).logits]
            tuned.set_adapter("other")
            found.append(tuned(ids).logits)
            with tuned.disable_adapter():
                found.append(tuned(ids).logits)
            tuned.base_model.set_adapter(["default", "other"])
            found.append(tuned(ids).logits)
            seen.append(found)
    for one, other in zip(*seen, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(seen[0][0], seen[0][2], atol=1e-3)


def test_the_first_layer_asks_for_no_gradient_of_what_nobody_trains() -> None:
    quick = products.quicken(model(r=4), FLOAT)
    embedded: list[Any] = []
    quick.get_input_embeddings().register_forward_hook(lambda *_: embedded.append(_[-1]))
    step(quick)
    assert not embedded[0].requires_grad


def test_layers_that_compute_otherwise_are_left_alone() -> None:
    plain = model(r=4)
    kinds = [type(module) for module in plain.modules()]
    assert [type(module) for module in products.quicken(plain, Compute("cuda", "float32")).modules()] == kinds
    assert [type(module) for module in products.quicken(plain, Compute("cpu", "bfloat16")).modules()] == kinds
    quick = products.quicken(plain, FLOAT)
    with torch.autocast("cpu", torch.bfloat16):
        assert quick(torch.arange(8)[None]).logits.dtype == torch.bfloat16


@pytest.mark.usefixtures("everywhere")
def test_quick_layers_are_found_by_the_libraries_as_what_they_are() -> None:
    quick = products.quicken(model(r=4), FLOAT)
    plain = model(r=4)
    merged = quick.merge_and_unload()
    assert list(merged.state_dict()) == list(plain.merge_and_unload().state_dict())
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(merged.parameters(), plain.model.parameters(), strict=True)
    )
