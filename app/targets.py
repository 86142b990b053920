"""Where an adapter goes: the presets of target modules, in the names of each architecture (no torch).

Names are those of the model as transformers builds it. A name stands for every module whose path ends with it, as in
peft; ``attn.c_proj`` is more exact than ``c_proj``.
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

Preset = Literal["minimal", "standard", "full"]
PRESETS: tuple[Preset, ...] = ("minimal", "standard", "full")
ALL_LINEAR = "all-linear"

# Not adapted: a low-rank change of a tied embedding cannot be merged, and peft leaves the head out too.
EMBEDDINGS = frozenset({"embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "embed_positions", "embed_out"})
HEADS = frozenset({"lm_head", "embed_out", "score"})


class Family(NamedTuple):
    """How the linear modules of related architectures are called."""

    minimal: tuple[str, ...]
    standard: tuple[str, ...]
    rest: tuple[str, ...]
    """What ``full`` adds to ``standard``."""
    experts: tuple[str, ...] = ()
    """Parameters that hold all experts of a layer; ``full`` reaches them too."""
    optional: frozenset[str] = frozenset()
    """Names that some models of the family lack."""
    transposed: bool = False
    """Weights are stored (in, out), as in GPT-2's Conv1D."""


class Targets(NamedTuple):
    """What an adapter is put on: modules by name, and parameters that are no module of their own."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...] = ()


_QV, _QKVO = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_SPARSE_EXPERTS = ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj")
_H4H = ("dense_h_to_4h", "dense_4h_to_h")

LLAMA = Family(_QV, _QKVO, _GATED)
_UNGATED = Family(_QV, _QKVO, ("up_proj", "down_proj"))
_FUSED_GATE = Family(_QV, _QKVO, ("gate_up_proj", "down_proj"))
# Layers without experts, and experts that every token passes, are plain modules where a model has them.
_MOE = Family(_QV, _QKVO, _GATED, _EXPERTS, frozenset(_GATED))
_GPT2 = ("c_attn",), ("c_attn", "attn.c_proj"), ("c_fc", "mlp.c_proj")
_OUT_PROJ = ("q_proj", "k_proj", "v_proj", "out_proj")
_BLOOM = Family(("query_key_value",), ("query_key_value", "self_attention.dense"), _H4H)
_LATENT = Family(  # multi-head latent attention: queries and keys go through a narrow layer
    ("q_proj", "q_b_proj", "kv_b_proj"),
    ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    _GATED,
    _EXPERTS,
    frozenset({"q_proj", "q_a_proj", "q_b_proj", *_GATED}),
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"),
            *("olmo", "olmo2", "olmo3", "granite", "stablelm", "cohere", "cohere2", "seed_oss", "exaone4", "helium"),
            *("ernie4_5", "bitnet", "hunyuan_v1_dense"),
        ),
        LLAMA,
    ),
    **dict.fromkeys(("nemotron", "arcee", "apertus"), _UNGATED),
    **dict.fromkeys(("glm", "glm4"), _FUSED_GATE),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "phimoe", "glm4_moe", "ernie4_5_moe"), _MOE),
    "gpt_oss": Family(_QV, _QKVO, (), _EXPERTS),
    "granitemoe": Family(_QV, _QKVO, (), _SPARSE_EXPERTS),
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "phi3": Family(("qkv_proj",), ("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj")),
    "phi": Family(_QV, ("q_proj", "k_proj", "v_proj", "self_attn.dense"), ("fc1", "fc2")),
    "starcoder2": Family(_QV, _QKVO, ("c_fc", "c_proj")),
    "gpt2": Family(*_GPT2, transposed=True),
    "gpt_bigcode": Family(*_GPT2),
    "gpt_neo": Family(_QV, _OUT_PROJ, ("c_fc", "c_proj")),
    "gpt_neox": Family(("query_key_value",), ("query_key_value", "attention.dense"), _H4H),
    "gptj": Family(_QV, _OUT_PROJ, ("fc_in", "fc_out")),
    "codegen": Family(("qkv_proj",), ("qkv_proj", "out_proj"), ("fc_in", "fc_out")),
    "opt": Family(_QV, _OUT_PROJ, ("fc1", "fc2")),
    "bloom": _BLOOM,
    "falcon": _BLOOM,
    "persimmon": Family(("query_key_value",), ("query_key_value", "self_attn.dense"), _H4H),
    "mpt": Family(("Wqkv",), ("Wqkv", "attn.out_proj"), ("up_proj", "down_proj")),
    "lfm2": Family(_QV, ("q_proj", "k_proj", "v_proj", "self_attn.out_proj"), ("w1", "w2", "w3")),
}


def model_types(config: Mapping[str, Any]) -> list[str]:
    """What a config.json calls its architecture, outermost first; ``text_config`` holds the language model's part."""
    inner = config.get("text_config")
    found = [config.get("model_type"), inner.get("model_type") if isinstance(inner, Mapping) else None]
    return [name for name in found if isinstance(name, str)]


def family_of(config: Mapping[str, Any], modules: Collection[str] = ()) -> Family | None:
    """The family of a model; one that is not in the table is known by its modules. None = we do not know it."""
    for name in model_types(config):
        if name in FAMILIES:
            return FAMILIES[name]
    plain = [family for family in FAMILIES.values() if not family.experts and not family.transposed]
    return next((family for family in plain if all(has(modules, name) for name in family.standard + family.rest)), None)


def spelt_out(preset: str, family: Family, modules: Collection[str] = ()) -> Targets:
    """A preset in the names of a family. ``modules``: those of the model, where they are known.

    ``all-linear`` is spelt out for families with experts alone: peft finds all other linear modules by itself.
    """
    names = family.minimal if preset == "minimal" else family.standard
    whole = preset in ("full", ALL_LINEAR)
    if whole:
        names += family.rest
    kept = tuple(name for name in names if name not in family.optional or not modules or has(modules, name))
    return Targets(kept, family.experts if whole else ())


def has(modules: Collection[str], name: str) -> bool:
    """Whether some module's path is the name or ends with it."""
    return any(ends(path, name) for path in modules)


def ends(path: str, name: str) -> bool:
    """As peft matches: the whole path, or its last parts."""
    return path == name or path.endswith(f".{name}")
