"""Writes a model's safetensors into one GGUF file, some rows at a time: memory does not grow with the model."""

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from app import gguf as rules
from app.errors import Code, RunError
from workers.loading.gguf_vocabulary import Vocabulary
from workers.loading.weights import TensorInfo, tensor_headers

_BLOCK_BYTES = 64 << 20
"""Float32 that is converted at a time."""
_Q8_BLOCK = 32
_FREQUENCIES = "rope_freqs.weight"


class Entry(NamedTuple):
    """One tensor of the file."""

    name: str
    source: str
    shape: tuple[int, ...]
    stored: str
    """F32, F16, BF16 or Q8_0."""
    heads: int
    """Of how many heads rows are put into the format's order; 0 = they stay as they are."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json with the defaults of its model type, as transformers reads it. Raises RunError model_invalid."""
    from transformers import AutoConfig

    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ).to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise RunError(Code.MODEL_INVALID, f"config.json cannot be read: {error}"[:500], param="model") from error
    if fault := rules.model_misfit(config):
        raise RunError(Code.MODEL_INVALID, fault.message, hint=fault.hint, param="model")
    return config


def entries(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], outtype: str) -> list[Entry]:
    """What becomes of each tensor. Vectors stay float32, as readers want them. Raises RunError model_invalid."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    family = rules.FAMILIES[config["model_type"]]
    architecture = next(key for key in MODEL_ARCH if MODEL_ARCH_NAMES[key] == family.architecture)
    names = get_tensor_name_map(architecture, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    found = []
    for source, info in sorted(tensors.items()):
        if source.endswith("rotary_emb.inv_freq") or (source == "lm_head.weight" and config["tie_word_embeddings"]):
            continue  # older checkpoints keep what follows from the config, or the embeddings a second time
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None or len(info.shape) > 2:
            raise RunError(
                Code.MODEL_INVALID,
                f"{source} {list(info.shape)} has no place in a GGUF file of a {config['model_type']}",
                hint="export the model as transformers saves it, with nothing added to it",
                param="model",
            )
        module = source.split(".")[-2]
        permuted = heads.get(module, 0) if family.permuted else 0
        found.append(Entry(name, source, info.shape, _stored(info.shape, outtype), permuted))
    return found


def _stored(shape: tuple[int, ...], outtype: str) -> str:
    if len(shape) < 2 or outtype == "f32":
        return "F32"
    if outtype == "q8_0" and shape[-1] % _Q8_BLOCK:
        return "F16"  # its rows are no whole blocks
    return outtype.upper()


def write_gguf(
    folder: Path,
    target: Path,
    config: Mapping[str, Any],
    vocabulary: Vocabulary,
    *,
    name: str,
    outtype: str,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> list[Entry]:
    """Writes ``target`` from the safetensors in ``folder``; ``told`` hears of bytes of weights, done and in all.

    ``config``: as transformers reads it, with its defaults. Raises RunError model_invalid, non_finite_weights.
    """
    import torch
    from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFWriter
    from safetensors import safe_open

    headers = tensor_headers(folder)
    planned = entries(config, headers, outtype)
    factors = frequency_factors(config)
    element = torch.empty(0).numpy().dtype  # what is stored instead is said beside it
    writer = GGUFWriter(target, rules.FAMILIES[config["model_type"]].architecture)
    _describe(writer, config, name, outtype)
    _spell(writer, vocabulary)
    if factors is not None:
        writer.add_tensor_info(_FREQUENCIES, factors.shape, element, 4 * len(factors))
    for entry in planned:
        kind = GGMLQuantizationType[entry.stored]
        writer.add_tensor_info(entry.name, entry.shape, element, _bytes(entry), raw_dtype=kind)
    done, total = 0, sum(_bytes(entry) for entry in planned)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # The writer itself takes whole tensors alone; the embeddings of a large vocabulary are gigabytes.
        assert writer.fout is not None
        file = writer.fout[0]
        file.write(bytes(-file.tell() % GGUF_DEFAULT_ALIGNMENT))
        if factors is not None:
            file.write(factors.numpy().tobytes())
            file.write(bytes(-file.tell() % GGUF_DEFAULT_ALIGNMENT))
        for entry in planned:
            with safe_open(str(headers[entry.source].path), framework="pt") as source:
                for block in _blocks(source, entry):
                    file.write(_encoded(block, entry))
            file.write(bytes(-file.tell() % GGUF_DEFAULT_ALIGNMENT))
            done += _bytes(entry)
            told(done, total)
    finally:
        writer.close()
    return planned


def _bytes(entry: Entry) -> int:
    size = prod(entry.shape)
    return size // _Q8_BLOCK * (_Q8_BLOCK + 2) if entry.stored == "Q8_0" else size * (4 if entry.stored == "F32" else 2)


def _blocks(source: Any, entry: Entry) -> Iterator[Any]:
    """Float32 rows as they are written, whole heads at a time where those are put in another order."""
    import torch

    whole = source.get_slice(entry.source)
    if len(entry.shape) < 2:
        vector = whole[:].to(torch.float32)
        yield paired(vector, entry.heads) if entry.heads else vector
        return
    head = entry.shape[0] // entry.heads if entry.heads else 1
    step = max(1, _BLOCK_BYTES // (4 * entry.shape[1] * head)) * head
    for start in range(0, entry.shape[0], step):
        rows = whole[start : start + step].to(torch.float32)
        yield paired(rows, len(rows) // head) if entry.heads else rows


def paired(rows: Any, heads: int) -> Any:
    """Rows of a query or key projection, in which halves are rotated together, with the pairs beside each other.

    Of each head rows 0, 1, 2 … become 0, d/2, 1, d/2 + 1 …, d being the size of a head.
    """
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _encoded(block: Any, entry: Entry) -> bytes:
    """Float32 values as the file has them. Raises RunError non_finite_weights."""
    import torch
    from gguf import GGMLQuantizationType, quantize

    if not bool(torch.isfinite(block).all()):
        raise RunError(Code.NON_FINITE_WEIGHTS, f"{entry.source} holds NaN or infinity", param="model")
    if entry.stored == "Q8_0":
        packed: bytes = quantize(block.contiguous().numpy(), GGMLQuantizationType.Q8_0).tobytes()
        return packed
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    stored = block.to(kinds[entry.stored]).contiguous()
    if not bool(torch.isfinite(stored).all()):
        raise RunError(
            Code.NON_FINITE_WEIGHTS,
            f"{entry.source} has weights beyond what {entry.stored.lower()} can hold",
            hint="export with outtype: bf16 or f32",
            param="outtype",
        )
    raw: bytes = stored.view(torch.uint8).numpy().tobytes()
    return raw


def frequency_factors(config: Mapping[str, Any]) -> Any:
    """By how much each rotary frequency is slowed, a float32 tensor of half a head's size; None where none is.

    Readers divide the plain frequencies by them, so that they need not know the rule behind.
    """
    import torch
    from transformers import CONFIG_MAPPING
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = rules.rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    slowed = ROPE_INIT_FUNCTIONS["llama3"](made, torch.device("cpu"))[0].double()
    size = head_size(config)
    plain = float(rope["rope_theta"]) ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / slowed).float()


def head_size(config: Mapping[str, Any]) -> int:
    """Width of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _describe(writer: Any, config: Mapping[str, Any], name: str, outtype: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[kinds[outtype]])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(rules.context_length(config))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(float(rules.rope_of(config)["rope_theta"]))


def _spell(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("llama" if vocabulary.sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if vocabulary.sentencepiece else vocabulary.reader)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.sentencepiece:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_first)
    else:
        writer.add_token_merges(vocabulary.merges)
    for role, index in vocabulary.special.items():
        getattr(writer, f"add_{role}_token_id")(index)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)
