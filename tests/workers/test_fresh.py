"""Fresh adapters: every kind begins as the base, and what is saved gives the tuned model on the untouched base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from app.errors import Code, RunError
from app.specs import PeftBlock
from tests.workers.conftest import make_model
from tests.workers.context import RecordingContext
from workers.loading import Compute, attach_adapter, canonical_adapter, keep_start, load_base, make_plain
from workers.loading.fresh import START_FILE

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:bitsandbytes",
    "ignore:.*_check_is_size will be removed:FutureWarning",
)
EXACT = Compute("cpu", "float32")
IDS = torch.arange(3, 43).reshape(4, 10)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases, and tied."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-qwen", architecture="qwen2")


def attached(base: Path, tmp_path: Path, **peft: Any) -> tuple[Any, RecordingContext]:
    torch.manual_seed(1)
    ctx = RecordingContext(tmp_path / "run")
    block = PeftBlock.model_validate({"r": 4, "lora_dropout": 0.0, **peft})
    return attach_adapter(load_base(base, EXACT), block, ctx), ctx


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def train(model: Any, steps: int = 3) -> Any:
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits(model)


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    keep_start(model, folder)
    canonical_adapter(folder, "tiny")
    make_plain(folder)
    return folder


VARIANTS: list[dict[str, Any]] = [
    {"use_dora": True},
    {"use_rslora": True, "init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "olora", "target_modules": "all-linear"},
    {"init_lora_weights": "pissa", "use_dora": True},
    {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    {"init_lora_weights": "olora", "modules_to_save": ["model.norm"], "bias": "all"},
    {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.q_proj": 8}, "alpha_pattern": {"v_proj": 32}},
    {"bias": "lora_only"},
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["lm_head", "up_proj"]},
]


@pytest.mark.parametrize("peft", VARIANTS, ids=lambda peft: "-".join(f"{name}={value}" for name, value in peft.items()))
def test_it_begins_as_the_base_and_is_saved_for_the_base(peft: dict[str, Any], tmp_path: Path, qwen: Path) -> None:
    model, _ = attached(qwen, tmp_path, **peft)
    untouched = load_base(qwen, EXACT)
    assert torch.allclose(logits(model), logits(untouched), atol=1e-5)
    tuned = train(model)
    folder = saved(model, tmp_path / "adapter")
    assert not (folder / START_FILE).exists()
    again = PeftModel.from_pretrained(load_base(qwen, EXACT), folder)
    assert torch.allclose(logits(again), tuned, atol=1e-4)
    assert not torch.allclose(tuned, logits(untouched), atol=1e-2)
    if peft.get("bias") is None:  # biases are changed in the model itself
        with again.disable_adapter():
            assert torch.equal(logits(again), logits(untouched))


def test_weights_that_are_stored_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=2, n_head=2)).save_pretrained(base)
    model, ctx = attached(base, tmp_path, target_modules="full", init_lora_weights="pissa")
    assert ctx.resolutions["model.peft_config.target_modules"] == ["attn.c_proj", "c_attn", "c_fc", "mlp.c_proj"]
    assert torch.allclose(logits(model), logits(load_base(base, EXACT)), atol=1e-5)
    tuned = train(model)
    again = PeftModel.from_pretrained(load_base(base, EXACT), saved(model, tmp_path / "adapter"))
    assert torch.allclose(logits(again), tuned, atol=1e-4)


def test_a_preset_that_reaches_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    base = tmp_path / "moe"
    Qwen3MoeForCausalLM(config).save_pretrained(base)
    model, _ = attached(base, tmp_path, target_modules="full")
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad and ".experts." in name]
    assert len(trained) == 2 * 2 * 2  # layers, both parameters, A and B
    tuned = train(model)
    again = PeftModel.from_pretrained(load_base(base, EXACT), saved(model, tmp_path / "adapter"))
    assert torch.allclose(logits(again), tuned, atol=1e-5)
    with pytest.raises(RunError, match="without dropout") as caught:
        attached(base, tmp_path, target_modules="full", lora_dropout=0.1)
    assert caught.value.param == "model.peft_config.lora_dropout"


def test_a_resumed_run_begins_with_the_same_base_to_the_last_bit(tmp_path: Path, qwen: Path) -> None:
    """By what the checkpoint keeps: a random start drawn anew would be another one."""
    model, _ = attached(qwen, tmp_path, init_lora_weights="pissa_niter_2")
    checkpoint = tmp_path / "checkpoint-3"
    model.save_pretrained(checkpoint)
    keep_start(model, checkpoint)
    torch.manual_seed(7)
    ctx = RecordingContext(tmp_path / "again")
    ctx.resume_from = checkpoint
    block = PeftBlock.model_validate({"r": 4, "lora_dropout": 0.0, "init_lora_weights": "pissa_niter_2"})
    again = attach_adapter(load_base(qwen, EXACT), block, ctx)
    expected = dict(model.named_parameters())
    assert all(torch.equal(weight, expected[name]) for name, weight in again.named_parameters())
    assert json.loads((checkpoint / "adapter_config.json").read_text())["init_lora_weights"] == "pissa_niter_2"


def test_ranks_go_by_the_longest_name_and_stay_so_when_stored(tmp_path: Path, qwen: Path) -> None:
    model, _ = attached(
        qwen, tmp_path, rank_pattern={"self_attn.q_proj": 8, "q_proj": 2, "layers.1.self_attn.q_proj": 3}
    )
    ranks = {
        name.split(".lora_A")[0].split("model.model.model.")[1]: weight.shape[0]
        for name, weight in model.named_parameters()
        if "lora_A" in name
    }
    assert (ranks["layers.0.self_attn.q_proj"], ranks["layers.1.self_attn.q_proj"]) == (8, 3)
    assert ranks["layers.1.self_attn.v_proj"] == 4
    PeftModel.from_pretrained(load_base(qwen, EXACT), saved(model, tmp_path / "adapter"))


def test_embedding_and_head_that_are_one_stay_one(tmp_path: Path, qwen: Path) -> None:
    model, _ = attached(qwen, tmp_path, modules_to_save=["embed_tokens"])
    tuned = train(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert torch.allclose(logits(again), tuned, atol=1e-5)


def test_what_does_not_fit_the_model_is_said_with_its_field(tmp_path: Path, qwen: Path) -> None:
    with pytest.raises(RunError, match="no module named nothing") as caught:
        attached(qwen, tmp_path, modules_to_save=["nothing"])
    assert (caught.value.code, caught.value.param) == (
        Code.TARGET_MODULES_NOT_FOUND,
        "model.peft_config.modules_to_save",
    )
