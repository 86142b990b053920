"""An exported file is the model: every family, every outtype, read back by transformers; what is not, is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from app import gguf as rules
from app.errors import Code, RunError
from tests.workers.conftest import conversation, make_tokenizer
from tests.workers.context import RecordingContext
from workers.loading import gguf_proof, gguf_write
from workers.loading.gguf_proof import load_gguf
from workers.operations import export
from workers.operations.export import ExportSpec

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "llama, wide heads": ("llama", {"tie_word_embeddings": False, "head_dim": 24}),
    "llama 3": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "mistral, tied": ("mistral", {"tie_word_embeddings": True, "sliding_window": None}),
    "mistral, untied": ("mistral", {"tie_word_embeddings": False, "sliding_window": 128}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    "qwen3, untied": ("qwen3", {"tie_word_embeddings": False, "head_dim": 32}),
}
READERS = {"llama, tied": "gpt-2", "llama 3": "llama-bpe", "mistral, untied": "llama", "qwen2, tied": "qwen2"}


def make_pieces(folder: Path) -> Any:
    """A tokenizer of the kind that sentencepiece makes: spaces are ▁, unknown letters become bytes, <s> goes first."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    texts = [turn["content"] for number in range(300) for turn in conversation(number)]
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    trained = json.loads(core.to_str())["model"]
    fixed = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    entries = [*fixed, *sorted(trained["vocab"], key=trained["vocab"].__getitem__)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(entries))}
    merges = [tuple(pair) for pair in trained["merges"]]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_split(folder: Path, name: str) -> Any:
    """The byte-level tokenizer, which cuts text as a family's does."""
    tokenizer = make_tokenizer(folder)
    pattern = next(pattern for pattern, known in rules._SPLITS.items() if known == name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make(folder: Path, label: str, rows: int = 0, dtype: str = "float32") -> Path:
    """A random model of a family, with queries and keys whose order matters. ``rows``: spare embeddings."""
    kind, more = FAMILIES[label]
    folder.mkdir(parents=True)
    if kind == "mistral":
        tokenizer = make_pieces(folder)
    elif kind == "llama":
        tokenizer = make_split(folder, "llama-bpe") if label == "llama 3" else make_tokenizer(folder)
    else:
        tokenizer = make_split(folder, "qwen2")
    torch.manual_seed(3)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer) + rows, **ids, **SIZES | more)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.normal_(std=0.1)
            elif "norm" in name:
                weight.uniform_(0.5, 1.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    (folder / "LICENSE").write_text("Do what you like.\n")
    return folder


def exported(root: Path, folder: Path, outtype: str = "f32") -> RecordingContext:
    ctx = RecordingContext(root, {"model": folder}, {"model": {"pinned": "artifact:art-m"}})
    export.run(ExportSpec.model_validate({"model": "m", "outtype": outtype, "output_name": "small"}), ctx)
    return ctx


def the_file(ctx: RecordingContext) -> Path:
    return ctx.folder / ctx.results["file"]


def field(path: Path, name: str) -> Any:
    found = GGUFReader(path).get_field(name)
    return found.contents() if found is not None else None


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family."""
    root = tmp_path_factory.mktemp("families")
    return {label: make(root / label.replace(", ", "-").replace(" ", "-"), label) for label in FAMILIES}


@pytest.mark.parametrize("label", FAMILIES)
def test_a_family_comes_back_bit_by_bit_in_float32(label: str, sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources[label]
    ctx = exported(tmp_path, source)
    proof = ctx.results["certificate"]
    assert (proof["max_weight_error"], proof["agreeing"], proof["prompts"]) == (0, 8, 8)
    assert proof["relative_logit_distance"] < 1e-5
    own = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    read = load_gguf(the_file(ctx)).state_dict()
    assert own.keys() == read.keys()
    assert all(torch.equal(own[name], read[name]) for name in own)
    names = {tensor.name for tensor in GGUFReader(the_file(ctx)).tensors}
    assert ("output.weight" in names) == (not FAMILIES[label][1]["tie_word_embeddings"])
    assert ("rope_freqs.weight" in names) == (label == "llama 3")
    assert ctx.results["tokenizer"] == READERS.get(label, ctx.results["tokenizer"])


@pytest.mark.parametrize("label", ["llama, untied", "qwen2, tied", "mistral, untied"])
@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_an_outtype_rounds_matrices_and_leaves_vectors(
    label: str, outtype: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    ctx = exported(tmp_path, sources[label], outtype)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(the_file(ctx)).tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == outtype.upper()
    assert {kinds[name] for name in kinds if name.endswith(("norm.weight", ".bias"))} == {"F32"}
    proof = ctx.results["certificate"]
    assert 0 < proof["max_weight_error"] < 0.005
    assert 0 < proof["relative_logit_distance"] <= proof["logit_tolerance"]


def test_what_is_stored_in_16_bits_comes_back_exactly(tmp_path: Path) -> None:
    source = make(tmp_path / "m", "qwen2, untied", dtype="bfloat16")
    proof = exported(tmp_path / "x", source, "bf16").results["certificate"]
    assert (proof["max_weight_error"], proof["agreeing"]) == (0, 8)


def test_the_file_says_what_a_reader_needs(sources: dict[str, Path], tmp_path: Path) -> None:
    ctx = exported(tmp_path, sources["llama, tied"], "q8_0")
    path = the_file(ctx)
    assert path.name == "small-q8_0.gguf"
    assert {name: field(path, name) for name in ("general.architecture", "general.name", "general.file_type")} == {
        "general.architecture": "llama",
        "general.name": "small",
        "general.file_type": 7,
    }
    wanted = {
        "context_length": 512,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
        "vocab_size": len(field(path, "tokenizer.ggml.tokens")),
    }
    assert {name: field(path, f"llama.{name}") for name in wanted} == wanted
    assert field(path, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    tokens, types = field(path, "tokenizer.ggml.tokens"), field(path, "tokenizer.ggml.token_type")
    assert tokens[field(path, "tokenizer.ggml.eos_token_id")] == "<|im_end|>"
    assert {types[tokens.index(token)] for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")} == {3}
    assert "<|im_start|>" in field(path, "tokenizer.chat_template")
    assert not field(path, "tokenizer.ggml.add_bos_token")


def test_sentencepiece_entries_keep_their_kind(sources: dict[str, Path], tmp_path: Path) -> None:
    path = the_file(exported(tmp_path, sources["mistral, untied"]))
    types = field(path, "tokenizer.ggml.token_type")
    assert (types[:4], types[258:260]) == ([2, 3, 3, 6], [6, 1])
    assert field(path, "tokenizer.ggml.model") == "llama"
    assert field(path, "tokenizer.ggml.add_bos_token")
    assert field(path, "tokenizer.ggml.add_space_prefix")
    assert field(path, "llama.context_length") == 128, "readers know no window: it ends the context"


def test_pairs_of_a_head_lie_beside_each_other(sources: dict[str, Path], tmp_path: Path) -> None:
    path = the_file(exported(tmp_path, sources["llama, untied"]))
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    own = AutoModelForCausalLM.from_pretrained(sources["llama, untied"]).state_dict()
    for ours, its in (("q_proj", "attn_q"), ("k_proj", "attn_k")):
        rows = own[f"model.layers.1.self_attn.{ours}.weight"]
        order = [head * 16 + row for head in range(len(rows) // 16) for n in range(8) for row in (n, n + 8)]
        assert torch.equal(torch.from_numpy(tensors[f"blk.1.{its}.weight"].copy()), rows[order])


def test_a_large_matrix_is_written_by_rows(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for outtype in ("f16", "q8_0"):
        whole = the_file(exported(tmp_path / f"{outtype}1", sources["llama, tied"], outtype)).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(gguf_write, "_BLOCK_BYTES", 1)
            assert the_file(exported(tmp_path / f"{outtype}2", sources["llama, tied"], outtype)).read_bytes() == whole


def test_spare_embeddings_get_names(tmp_path: Path) -> None:
    path = the_file(exported(tmp_path / "x", make(tmp_path / "m", "qwen2, tied", rows=7)))
    tokens = field(path, "tokenizer.ggml.tokens")
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]"
    assert field(path, "tokenizer.ggml.token_type")[-7:] == [5] * 7


def test_the_output_is_of_its_own_kind_and_remembers(sources: dict[str, Path], tmp_path: Path) -> None:
    ctx = exported(tmp_path, sources["qwen2, tied"])
    kind, folder, facts = ctx.outputs[0]
    assert (kind, facts) == ("gguf", {"name": "small", "format": "gguf", "outtype": "f32", "of": "artifact:art-m"})
    assert {path.name for path in folder.iterdir()} == {"small-f32.gguf", "certificate.json", "LICENSE"}
    assert json.loads((folder / "certificate.json").read_text()) == ctx.results["certificate"]
    assert ctx.hashed[the_file(ctx)] == ctx.results["certificate"]["sha256"]
    assert ctx.phases == ["loading", "saving", "validating"]


# what must not pass


def fails(root: Path, folder: Path, code: Code, match: str, outtype: str = "f32") -> RunError:
    with pytest.raises(RunError, match=match) as caught:
        exported(root, folder, outtype)
    assert caught.value.code == code
    return caught.value


def test_rows_in_the_wrong_order_are_found_by_weights_and_by_logits(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_write, "paired", lambda rows, heads: rows)
    found = fails(tmp_path / "1", sources["llama, tied"], Code.VALIDATION_FAILED, "rounding to F32 does not explain")
    assert "proj.weight differs" in found.message
    monkeypatch.setattr(gguf_proof, "_same_weights", lambda *_: 0.0)
    fails(tmp_path / "2", sources["llama, tied"], Code.VALIDATION_FAILED, "a logit is")


def test_two_tokens_that_changed_places_are_found(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = export.read_vocabulary

    def wrong(tokenizer: Any, rows: int) -> Any:
        found = read(tokenizer, rows)
        tokens = list(found.tokens)
        one, two = tokens.index("a"), tokens.index("e")
        tokens[one], tokens[two] = tokens[two], tokens[one]
        return dataclasses.replace(found, tokens=tokens)

    monkeypatch.setattr(export, "read_vocabulary", wrong)
    fails(tmp_path, sources["qwen2, tied"], Code.VALIDATION_FAILED, "with other tokens")


def test_another_choice_is_a_failure_unless_rounding_explains_it(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_proof, "_generated", lambda *_: 0)
    fails(tmp_path, sources["qwen2, tied"], Code.VALIDATION_FAILED, "it generates token 0")


def changed(tmp_path: Path, name: str, value: float) -> Path:
    folder = make(tmp_path / "m", "llama, tied")
    path = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(path)
    tensors[name].view(-1)[3] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_weights_that_the_file_cannot_hold(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = changed(tmp_path, name, 1e5)
    error = fails(tmp_path / "1", folder, Code.NON_FINITE_WEIGHTS, "beyond what f16 can hold", "f16")
    assert error.param == "outtype"
    fails(tmp_path / "2", changed(tmp_path / "nan", name, float("nan")), Code.NON_FINITE_WEIGHTS, "holds NaN")


def test_a_tensor_without_a_place(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "llama, tied")
    weights = min(folder.glob("*.safetensors"))
    more = {**load_file(weights), "model.layers.0.extra.weight": torch.ones(2, 2)}
    save_file(more, weights, {"format": "pt"})
    fails(tmp_path / "x", folder, Code.MODEL_INVALID, r"model\.layers\.0\.extra\.weight \[2, 2\] has no place")


def test_more_tokens_than_embeddings(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "llama, tied")
    tokenizer = make_tokenizer(folder)
    tokenizer.add_tokens(["a whole sentence"])
    tokenizer.save_pretrained(folder)
    fails(tmp_path / "x", folder, Code.MODEL_INVALID, "embeddings")


def test_a_tokenizer_that_no_reader_knows(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "llama, tied")
    tokenizer = make_tokenizer(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(folder)
    fails(tmp_path / "x", folder, Code.MODEL_INVALID, "readers know no tokenizer")
