"""Which models and tokenizers can be written as GGUF: judged by config.json and tokenizer.json, nothing is loaded.

The names are those of the format's own specification; readers choose by them what they compute.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

MOST_TOKENIZER = 64 << 20
"""Bytes of a tokenizer.json that is looked at; those of large vocabularies have 20 MB."""


class Family(NamedTuple):
    """How the format knows a family of models."""

    architecture: str
    permuted: bool
    """Whether rows of q_proj and k_proj lie in the order of the original Llama code, pairs beside each other."""


FAMILIES = {
    "llama": Family("llama", True),
    "mistral": Family("llama", True),
    "qwen2": Family("qwen2", False),
    "qwen3": Family("qwen3", False),
}
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_LETTERS + r"\p{N}{1,3}" + _OTHERS: "llama-bpe", _LETTERS + r"\p{N}" + _OTHERS: "qwen2", _CASED: "tekken"}
# Readers of these take a word that is an entry as it stands, whatever the merges say.
WHOLE_WORDS = ("llama-bpe", "tekken")
SENTENCEPIECE = "llama"
_IDLE = ("none", "default", None)


class Misfit(NamedTuple):
    """Why something cannot be written, and what to do instead."""

    message: str
    hint: str


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding's settings, ``rope_type`` and ``rope_theta`` among them, from a config old or new."""
    told = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = dict(told) if isinstance(told, dict) else {}
    rope.setdefault("rope_type", rope.pop("type", None) or "default")
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    return rope


def model_misfit(config: Mapping[str, Any]) -> Misfit | None:
    """The first thing in a config that the format, or our writing of it, has no place for."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        return Misfit(f"models of type {kind!r} are not written as GGUF here", f"Families that are: {known}.")
    names = config.get("architectures") or []
    if isinstance(names, list) and names and not any(str(name).endswith("ForCausalLM") for name in names):
        return Misfit(f"{names[0]} generates no text", "Name a causal language model.")
    if config.get("quantization_config"):
        return Misfit("its weights are stored quantised", "Name the unquantised model that it was made from.")
    if config.get("hidden_act", "silu") != "silu":
        return Misfit(f"hidden_act {config['hidden_act']!r} is not what readers compute", "Only silu can be exported.")
    biased = [name for name in ("attention_bias", "mlp_bias") if config.get(name)]
    if biased:
        return Misfit(f"readers know no {biased[0]} for {kind}", "Serve this model as it is.")
    if config.get("use_sliding_window"):
        return Misfit(f"readers know no sliding window for {kind}", "Serve this model as it is.")
    rope = rope_of(config)["rope_type"]
    if rope not in (*_IDLE, "llama3"):
        hint = "Export the model without it, within its original context, or serve it as it is."
        return Misfit(f"rope scaling {rope!r} is not written here", hint)
    return None


def context_length(config: Mapping[str, Any]) -> int:
    """Tokens that readers may use: a window that they would not know of ends it."""
    longest = int(config["max_position_embeddings"])
    window = config.get("sliding_window") if config.get("model_type") == "mistral" else None
    return min(longest, int(window)) if window else longest


def tokenizer_misfit(document: Mapping[str, Any]) -> Misfit | None:
    """The same of a tokenizer.json."""
    model = document.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if kind != "BPE":
        return Misfit(f"a tokenizer of type {kind} is not written as GGUF here", "Only BPE tokenizers can be exported.")
    name = reader_of(document)
    if name is None:
        return Misfit(
            "readers know no tokenizer that cuts text as this one does (pre_tokenizer in tokenizer.json)",
            "Known: those of GPT-2, SmolLM, Llama 2 and 3, Qwen2, Mistral; give the model the tokenizer of its base.",
        )
    assert isinstance(model, dict)
    if model.get("ignore_merges") and name not in WHOLE_WORDS:
        return Misfit(
            f"readers of {name} tokenizers know no ignore_merges", "Give the model the tokenizer of its base."
        )
    return None


def reader_of(document: Mapping[str, Any]) -> str | None:
    """The name by which readers cut text as this tokenizer does; ``llama`` for sentencepiece's, None: there is none."""
    if (document.get("model") or {}).get("byte_fallback"):
        return SENTENCEPIECE if _marks_spaces(document) else None
    if (document.get("normalizer") or {}).get("type") not in (None, "NFC"):
        return None
    parts = _parts(document.get("pre_tokenizer"), "pretokenizers")
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    before, whole = parts[:-1], parts[-1].get("use_regex", True)
    if not before:
        return "gpt-2" if whole else None
    if len(before) > 1:
        return None
    if before[0].get("type") == "Digits":
        return "smollm" if whole and before[0].get("individual_digits") else None
    pattern = (before[0].get("pattern") or {}).get("Regex")
    plain = before[0].get("behavior") == "Isolated" and not before[0].get("invert")
    return _SPLITS.get(str(pattern)) if before[0].get("type") == "Split" and plain and not whole else None


def _marks_spaces(document: Mapping[str, Any]) -> bool:
    """Whether spaces become ▁, by a normalizer or by the pre-tokenizer, and nothing else is changed or cut."""
    normal = _parts(document.get("normalizer"), "normalizers")
    cuts = _parts(document.get("pre_tokenizer"), "pretokenizers")
    replaces = [part for part in normal if part.get("type") == "Replace" and part.get("content") == "▁"]
    known = all(part.get("type") in ("Prepend", "Replace") for part in normal) and len(replaces) == len(
        [part for part in normal if part.get("type") == "Replace"]
    )
    if not cuts:
        return known and bool(replaces)
    meta = cuts[0].get("type") == "Metaspace" and cuts[0].get("replacement") == "▁" and not cuts[0].get("split")
    return not normal and len(cuts) == 1 and meta


def puts_space_first(document: Mapping[str, Any]) -> bool:
    """Whether a sentencepiece tokenizer reads a text as if a space stood before it."""
    normal = _parts(document.get("normalizer"), "normalizers")
    cuts = _parts(document.get("pre_tokenizer"), "pretokenizers")
    if any(part.get("type") == "Prepend" for part in normal):
        return True
    return any(part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never" for part in cuts)


def _parts(step: Any, inner: str) -> list[dict[str, Any]]:
    """The steps of a sequence, of one step, or of none."""
    if not isinstance(step, dict):
        return []
    parts = step.get(inner) if step.get("type") == "Sequence" else [step]
    return [part for part in parts or [] if isinstance(part, dict)]
