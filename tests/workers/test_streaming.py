"""The streaming merge writes what peft writes, to the last bit, and goes on where it broke off."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)

from app.errors import Code, RunError
from workers.loading import fold, read_merge, tensor_headers, write_merge
from workers.loading.deltas import BLOCK, LEAST_ROWS, blocks
from workers.loading.shards import Stream

pytestmark = [
    # peft about odd combinations, which are the point here.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts_per_tok": 2}
CONFIGS: dict[str, Callable[..., Any]] = {
    "qwen2": Qwen2Config,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "gemma": lambda **sizes: GemmaConfig(head_dim=16, **sizes),
    "phi": PhiConfig,
    "gpt2": lambda tie_word_embeddings=True, **_: GPT2Config(
        vocab_size=96,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=tie_word_embeddings,
    ),
    "qwen2_moe": lambda **sizes: Qwen2MoeConfig(
        num_experts=3, moe_intermediate_size=32, shared_expert_intermediate_size=32, **_EXPERTS, **sizes
    ),
    "mixtral": lambda **sizes: MixtralConfig(num_local_experts=3, **_EXPERTS, **sizes),
    "gpt_oss": lambda **sizes: GptOssConfig(num_local_experts=3, head_dim=16, **_EXPERTS, **sizes),
}
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"]}
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make_base(
    folder: Path, architecture: str, *, dtype: str = "float32", tied: bool = True, shards: str = "5GB"
) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture](**SIZES, tie_word_embeddings=tied))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shards)
    return folder


def make_adapter(folder: Path, base: Path, *, seed: int = 1, size: float = 0.1, **peft: Any) -> Path:
    """Random factors, biases and saved modules, all of the given size."""
    model = load(base, "float32")
    torch.manual_seed(seed)
    kind = json.loads((base / "config.json").read_text())["model_type"]
    config = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS.get(kind, "all-linear"), **peft}
    wrapped = get_peft_model(model, LoraConfig(fan_in_fan_out=kind == "gpt2", **config))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_magnitude" in name:
                weight.mul_(1 + size * torch.rand_like(weight))
            elif weight.requires_grad:
                weight.add_(torch.randn_like(weight) * size)
    wrapped.save_pretrained(folder, save_embedding_layers="auto")
    return folder


def load(folder: Path, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def by_peft(base: Path, adapter: Path, dtype: str, folder: Path) -> dict[str, Any]:
    """The files that peft's merge leaves."""
    model = PeftModel.from_pretrained(load(base, dtype), adapter)
    model.merge_and_unload(safe_merge=False).save_pretrained(folder)
    return stored(folder)


def stored(folder: Path) -> dict[str, Any]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def ours(base: Path, adapters: list[Path], folder: Path, dtype: Any = None, shard_bytes: int = 10**9) -> dict[str, Any]:
    folder.mkdir(parents=True)
    kept = folder.parent / f"{folder.name}-kept"
    merge = read_merge(base, adapters, dtype)
    digests = write_merge(merge, folder, kept, shard_bytes=shard_bytes)
    assert digests is not None
    assert not list(kept.iterdir())
    return stored(folder)


def assert_same_bits(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), (name, (found[name].float() - tensor.float()).abs().max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "mistral", "gemma", "phi", "gpt2"])
def test_plain_lora_has_the_bytes_of_pefts_merge(architecture: str, dtype: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", architecture, dtype=dtype)
    adapter = make_adapter(tmp_path / "adapter", base)
    expected = by_peft(base, adapter, dtype, tmp_path / "peft")
    assert_same_bits(ours(base, [adapter], tmp_path / "ours"), expected)
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in stored(base).items())
    # Not the tensors alone: header, order and padding as safetensors itself writes them.
    mine, theirs = ((tmp_path / who / "model.safetensors").read_bytes() for who in ("ours", "peft"))
    assert mine == theirs


@pytest.mark.parametrize("seed", range(8))
def test_any_architecture_rank_pattern_and_shard_size(seed: int, tmp_path: Path) -> None:
    dice = random.Random(seed)
    architecture = dice.choice(["qwen2", "llama", "mistral", "gemma", "phi", "qwen2_moe", "mixtral"])
    dtype = dice.choice(["float32", "bfloat16", "float16"])
    base = make_base(
        tmp_path / "base", architecture, dtype=dtype, tied=dice.random() < 0.5, shards=dice.choice(["5GB", "100KB"])
    )
    adapter = make_adapter(
        tmp_path / "adapter",
        base,
        seed=seed,
        r=dice.choice([1, 3, 8, 24]),
        lora_alpha=dice.choice([1, 7, 16]),
        use_rslora=dice.random() < 0.5,
        bias=dice.choice(["none", "lora_only", "all"]),
        rank_pattern={"q_proj": dice.choice([2, 5])},
        alpha_pattern={r"layers\.1\.self_attn\.[qv]_proj": 3, "q_proj": 11},
    )
    expected = by_peft(base, adapter, dtype, tmp_path / "peft")
    found = ours(base, [adapter], tmp_path / "ours", shard_bytes=dice.choice([1, 50_000, 10**9]))
    # Experts and their router are bare parameters, whose update peft rounds before it adds it.
    experts = {name for name in expected if ".experts." in name or name.endswith(".gate.weight")}
    assert_same_bits(*({name: part[name] for name in part if name not in experts} for part in (found, expected)))
    for name in experts:
        torch.testing.assert_close(found[name], expected[name], rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize(
    ("architecture", "peft"),
    [
        ("qwen2_moe", {"target_parameters": FUSED, "target_modules": ["q_proj"]}),
        ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
        ("gpt_oss", {"target_parameters": FUSED, "target_modules": ["q_proj"]}),
    ],
)
def test_experts_as_peft_adapts_them(architecture: str, peft: dict[str, Any], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", architecture, tied=False)
    adapter = make_adapter(tmp_path / "adapter", base, **peft)
    expected = by_peft(base, adapter, "float32", tmp_path / "peft")
    found = ours(base, [adapter], tmp_path / "ours")
    assert found.keys() == expected.keys()
    before = stored(base)
    changed = [name for name in expected if ".experts." in name and not torch.equal(before[name], expected[name])]
    assert changed
    for name, tensor in expected.items():
        # peft multiplies all experts at once, and rounds what it adds to the base's dtype first.
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_dora_is_within_a_rounding_of_pefts(architecture: str, dtype: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", architecture, dtype=dtype)
    adapter = make_adapter(tmp_path / "adapter", base, use_dora=True)
    expected = by_peft(base, adapter, dtype, tmp_path / "peft")
    found = ours(base, [adapter], tmp_path / "ours")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-6 if dtype == "float32" else 2**-8, atol=1e-7)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "peft",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "lora_bias": True},
        {"target_modules": ["embed_tokens"], "use_dora": True},
    ],
)
def test_embeddings_heads_and_whole_modules_answer_as_the_unmerged_pair(
    peft: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", "qwen2", tied=tied)
    adapter = make_adapter(tmp_path / "adapter", base, **peft)
    ours(base, [adapter], tmp_path / "ours")
    ids = torch.arange(2, 40).view(1, -1)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load(base, "float32"), adapter).eval()(input_ids=ids).logits
        found = load(tmp_path / "ours", "float32").eval()(input_ids=ids).logits
        before = load(base, "float32").eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-2)


def test_a_chain_is_added_in_its_order_and_rounded_once(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", dtype="bfloat16")
    first = make_adapter(tmp_path / "first", base, use_dora=True)
    fold(base, [first], "base", tmp_path / "start")
    second = make_adapter(
        tmp_path / "second", tmp_path / "start", seed=2, modules_to_save=["norm"], target_modules=["q_proj"]
    )
    found = ours(base, [first, second], tmp_path / "ours")
    wide = ours(tmp_path / "start", [second], tmp_path / "wide")
    assert_same_bits(found, {name: tensor.bfloat16() for name, tensor in wide.items()})


def test_the_prefix_that_some_files_leave_out_is_found(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    adapter = make_adapter(tmp_path / "adapter", base)
    expected = ours(base, [adapter], tmp_path / "ours")
    bare = shutil.copytree(base, tmp_path / "bare")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in stored(base).items()},
        bare / "model.safetensors",
        metadata={"format": "pt"},
    )
    found = ours(bare, [adapter], tmp_path / "bare-ours")
    assert_same_bits({f"transformer.{name}": tensor for name, tensor in found.items()}, expected)


def test_copies_are_exact_and_other_dtypes_stay(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", dtype="bfloat16")
    tensors = stored(base) | {"counter": torch.tensor([1, 2, 3]), "scale": torch.tensor(2.5), "none": torch.empty(0, 4)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(tmp_path / "adapter", make_base(tmp_path / "plain", "llama"), target_modules=["q_proj"])
    found = ours(base, [adapter], tmp_path / "ours")
    same = {name: tensor for name, tensor in tensors.items() if "q_proj" not in name}
    assert_same_bits({name: found[name] for name in same}, same)
    narrow = ours(base, [adapter], tmp_path / "narrow", "float16")
    assert {name: str(tensor.dtype) for name, tensor in narrow.items() if "float16" not in str(tensor.dtype)} == {
        "counter": "torch.int64"
    }


def test_shards_are_no_larger_than_asked_and_indexed(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base)
    whole = ours(base, [adapter], tmp_path / "whole")
    found = ours(base, [adapter], tmp_path / "parts", shard_bytes=100_000)
    assert_same_bits(found, whole)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    sizes = [sum(info.bytes for info in tensor_headers(tmp_path / "parts").values() if info.path.name == name)
             for name in set(index["weight_map"].values())]  # fmt: skip
    assert len(sizes) > 3
    assert max(sizes) <= 100_000
    assert index["metadata"]["total_size"] == sum(sizes)
    assert_same_bits(
        dict(load(tmp_path / "parts", "float32").state_dict()), dict(load(tmp_path / "whole", "float32").state_dict())
    )


def test_a_merge_goes_on_with_the_shards_that_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base)
    expected = ours(base, [adapter], tmp_path / "expected", shard_bytes=100_000)
    merge, kept = read_merge(base, [adapter]), tmp_path / "kept"
    finish, finished = Stream._finish, []

    def dying(self: Any, opened: Any) -> None:
        if len(finished) == 2:
            raise KeyboardInterrupt
        finish(self, opened)
        finished.append(opened.shard.name)

    monkeypatch.setattr(Stream, "_finish", dying)
    with pytest.raises(KeyboardInterrupt):
        write_merge(merge, tmp_path, kept, shard_bytes=100_000)
    monkeypatch.setattr(
        Stream, "_finish", lambda self, opened: (finish(self, opened), finished.append(opened.shard.name))
    )
    whole = finished[:2]
    before = {name: os.stat(kept / name).st_ino for name in whole}
    damaged = kept / whole[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    finished.clear()
    (tmp_path / "out").mkdir()
    told: list[int] = []
    write_merge(
        merge, tmp_path / "out", kept, shard_bytes=100_000, told=lambda done, total: told.append(done * 100 // total)
    )
    assert whole[0] not in finished
    assert whole[1] in finished
    assert os.stat(tmp_path / "out" / whole[0]).st_ino == before[whole[0]]
    assert told[0] > 0
    assert told[-1] == 100
    assert_same_bits(stored(tmp_path / "out"), expected)


def test_shards_of_another_merge_are_not_taken(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    first, second = (make_adapter(tmp_path / f"a{seed}", base, seed=seed) for seed in (1, 2))
    kept = tmp_path / "kept"
    shards = read_merge(base, [first]).shards(10**9)
    stream = Stream(shards, kept, "another", threads=1, told=lambda done: None, stop=lambda: False)
    assert stream.run()
    (tmp_path / "out").mkdir()
    write_merge(read_merge(base, [second]), tmp_path / "out", kept, shard_bytes=10**9)
    assert_same_bits(stored(tmp_path / "out"), ours(base, [second], tmp_path / "expected"))


def test_it_stops_when_it_is_asked_to(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base)
    (tmp_path / "out").mkdir()
    assert (
        write_merge(read_merge(base, [adapter]), tmp_path / "out", tmp_path / "kept", shard_bytes=1, stop=lambda: True)
        is None
    )
    assert not list((tmp_path / "out").iterdir())


def test_blocks_cover_every_row_once_and_none_is_short() -> None:
    for shape in [(1, 5), (63, 9), (64, BLOCK), (1000, BLOCK // 64), (4097, BLOCK // 128), (3, 200, BLOCK // 64), (7,)]:
        rows = [row for block in blocks(shape) for row in range(block.first, block.first + block.stop - block.start)]
        height = shape[0] * shape[1] if len(shape) == 3 else shape[0] if len(shape) == 2 else 1
        assert rows == list(range(height))
        if height >= LEAST_ROWS:
            assert all(block.stop - block.start >= LEAST_ROWS for block in blocks(shape))
    assert not list(blocks((0, 4)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"init_lora_weights": "pissa"}, "began with a part of its base"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"trainable_token_indices": [3]}, "trainable tokens"),
        ({"use_qalora": True}, "QALoRA"),
    ],
)
def test_what_is_no_plain_lora_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RunError, match=said) as caught:
        read_merge(base, [adapter])
    assert caught.value.code == Code.ADAPTER_INVALID


def test_a_tensor_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base)
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.model.embed_tokens.lora_tokens": torch.ones(2)}, path)
    with pytest.raises(RunError, match="lora_tokens, which no plain LoRA"):
        read_merge(base, [adapter])
