"""Where the tensors of an adapter go: from peft's names to the tensors that a base stores; headers alone, no torch."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from app.errors import Code, RunError
from app.peft import MOVING_STARTS, VARIANTS
from app.targets import model_types
from workers.loading.weights import TensorInfo

PREFIX = "base_model.model."
HEAD = "lm_head.weight"
ALPHA = 8
"""``lora_alpha`` of a config that names none, as in peft."""
Headers = Mapping[str, TensorInfo]
_FACTORS = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.(?P<of>weight|bias))?$"
)
# How bases store experts that peft adapts as one tensor: stored module, first half of gate_up, second half, down.
_EXPERTS = (("mlp.experts", "gate_proj", "up_proj", "down_proj"), ("block_sparse_moe.experts", "w1", "w3", "w2"))
# Architectures whose experts lie in one tensor of (experts, in, out); everywhere else it is (experts, out, in).
_INPUT_FIRST = frozenset({"gpt_oss", "aria", "aria_text"})
# Architectures whose layers are Conv1D, which stores (in, out). An adapter's own fan_in_fan_out does not count: peft
# sets it by the layer, whatever the file says.
_CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})


class Placed(NamedTuple):
    """One thing that an adapter does to one stored tensor."""

    target: str
    """The stored tensor."""
    kind: Literal["low_rank", "whole", "bias"]
    """W + scale · B · A; the tensor itself; b + scale · bias."""
    module: str
    """As the adapter calls it."""
    names: tuple[str, ...]
    """Tensors of the adapter: B and A, or the one."""
    scale: float = 1.0
    transposed: bool = False
    """The base stores (in, out): embeddings, Conv1D."""
    magnitude: str | None = None
    """DoRA's lengths, one for each output."""
    experts: int = 1
    """A is [experts · r, in], B [out, r · experts]."""
    expert: int | None = None
    """The one that this target holds; None = all of them, one after the other."""
    rows: tuple[int, int] | None = None
    """Which outputs of B this target holds; None = all."""


def place(config: Mapping[str, Any], tensors: Headers, base: Headers, base_config: Mapping[str, Any]) -> list[Placed]:
    """Every tensor of the adapter, placed. Raises RunError adapter_invalid, base_mismatch.

    A head that is tied to the embedding is not stored; what goes there is placed on ``lm_head.weight``.
    """
    _refuse_variants(config)
    layout = _Layout(config, tensors, base, base_config)
    groups: dict[str, dict[str, str]] = {}
    placed: list[Placed] = []
    for name in sorted(tensors):
        plain = name.removeprefix(PREFIX)
        if match := _FACTORS.match(plain):
            part = match["part"].removeprefix("lora_").removeprefix("embedding_")
            key = "bias" if match["of"] == "bias" else "E" + part if "embedding" in match["part"] else part
            groups.setdefault(match["module"], {})[key] = name
        elif "lora_" in plain or "token_adapter" in plain:
            raise RunError(Code.ADAPTER_INVALID, f"the adapter holds {plain}, which no plain LoRA or DoRA has")
        else:
            placed += layout.whole(name, plain)
    for module, group in sorted(groups.items()):
        placed += layout.factors(module, group)
    return placed


def _refuse_variants(config: Mapping[str, Any]) -> None:
    for key, label in VARIANTS.items():
        if config.get(key):
            raise RunError(
                Code.ADAPTER_INVALID,
                f"the adapter uses {label} ({key}), which cannot be merged",
                hint="Merged are LoRA, rsLoRA and DoRA, with bias and modules_to_save.",
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(MOVING_STARTS):
        raise RunError(
            Code.ADAPTER_INVALID,
            f"the adapter began with a part of its base (init_lora_weights: {start}), which the whole base still holds",
            hint="Save it with path_initial_model_for_weight_conversion, which makes it a plain one.",
        )


class _Layout:
    def __init__(
        self, config: Mapping[str, Any], tensors: Headers, base: Headers, base_config: Mapping[str, Any]
    ) -> None:
        self._config = config
        self._tensors = tensors
        self._base = base
        self._conv1d = not _CONV1D.isdisjoint(model_types(base_config))
        kind = base_config.get("model_type")
        self._input_first = kind in _INPUT_FIRST
        tied = base_config.get("tie_word_embeddings", True)
        self._tied = embedding_of(base) if tied and HEAD not in base else None

    def stored(self, path: str) -> str | None:
        """The stored name of a parameter: its own, or without the model's prefix, which some files leave out."""
        for known in (path, path.replace(".mlp.", ".block_sparse_moe.")):  # Mixtral's files have an older name
            short = known
            for _ in range(3):
                if short in self._base:
                    return short
                short = short.partition(".")[2]
        return HEAD if path == HEAD and self._tied else None

    def shape(self, target: str) -> tuple[int, ...]:
        """Of a stored tensor; of a tied head that of the embedding."""
        return self._base[self._tied if target == HEAD and self._tied else target].shape

    def whole(self, name: str, plain: str) -> Iterator[Placed]:
        """``modules_to_save``, biases, and the copy of an embedding that peft stores beside its factors."""
        path = plain.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        target = self.stored(path)
        if target is None or self.shape(target) != self._tensors[name].shape:
            self._misfit(path, self._tensors[name].shape, None if target is None else self.shape(target))
        assert target is not None
        yield Placed(target, "whole", path.rpartition(".")[0], (name,))

    def factors(self, module: str, group: Mapping[str, str]) -> Iterator[Placed]:
        """The parts of one module."""
        embedding = "EA" in group or "EB" in group
        a, b = (group.get(key) for key in (("EA", "EB") if embedding else ("A", "B")))
        shapes = {key: self._tensors[name].shape for key, name in group.items()}
        if a is None or b is None or len(shapes) != len(group):
            raise RunError(Code.ADAPTER_INVALID, f"{module}: lora_A and lora_B do not belong together: {shapes}")
        (left, right) = self._tensors[a].shape, self._tensors[b].shape
        if len(left) != 2 or len(right) != 2 or left[0] != right[1] or left[0] == 0:
            raise RunError(Code.ADAPTER_INVALID, f"{module}: lora_A and lora_B do not belong together: {shapes}")
        target = self.stored(f"{module}.weight")
        if target is None:
            yield from self._experts(module, a, b)
            return
        shape, flat = self.shape(target), (right[0], left[1])
        square = flat[0] == flat[1]
        transposed = embedding or (self._conv1d if square else shape == flat[::-1] and self._conv1d)
        if shape != (flat[::-1] if transposed else flat):
            self._misfit(module, flat[::-1] if transposed or self._conv1d else flat, shape)
        magnitude = group.get("magnitude_vector")
        if magnitude and self._tensors[magnitude].shape not in ((flat[0],), (1, flat[0])):
            raise RunError(Code.ADAPTER_INVALID, f"{module}: DoRA's lengths do not belong to it: {shapes}")
        scale = self._scale(module, left[0])
        yield Placed(target, "low_rank", module, (b, a), scale, transposed, magnitude)
        if "bias" in group:
            bias = self.stored(f"{module}.bias")
            if bias is None or self.shape(bias) != self._tensors[group["bias"]].shape:
                self._misfit(
                    f"{module}.bias", self._tensors[group["bias"]].shape, None if bias is None else self.shape(bias)
                )
            assert bias is not None
            yield Placed(bias, "bias", module, (group["bias"],), scale)

    def _experts(self, module: str, a: str, b: str) -> Iterator[Placed]:
        """All experts of a layer, which peft adapts as one parameter and most bases store one by one."""
        path = module
        while path.endswith(".base_layer"):  # peft nests one wrapper into the other
            path = path.removesuffix(".base_layer")
        inner, outer = self._tensors[a].shape[1], self._tensors[b].shape[0]
        ranks = self._tensors[a].shape[0]
        for parameter in ("gate_up_proj", "down_proj"):
            stored = self.stored(f"{path}.{parameter}")
            if stored is None or len(shape := self._base[stored].shape) != 3:
                continue
            if shape[1:] == ((inner, outer) if self._input_first else (outer, inner)):
                scale = self._scale(f"{path}.{parameter}", self._rank(module, ranks, shape[0]))
                yield Placed(stored, "low_rank", module, (b, a), scale, self._input_first, experts=shape[0])
                return
        yield from self._one_by_one(module, path, a, b, inner, outer, ranks)

    def _one_by_one(
        self, module: str, path: str, a: str, b: str, inner: int, outer: int, ranks: int
    ) -> Iterator[Placed]:
        for place_, gate, up, down in _EXPERTS:
            root = path.removesuffix("mlp.experts").removesuffix("block_sparse_moe.experts") + place_
            first = self.stored(f"{root}.0.{gate}.weight")
            if first is None:
                continue
            stem = first.removesuffix(f".0.{gate}.weight")
            count = next(number for number in range(1 << 16) if f"{stem}.{number}.{gate}.weight" not in self._base)
            half, lower = self.shape(first), self.shape(f"{stem}.0.{down}.weight")
            if (outer, inner) == (2 * half[0], half[1]):
                parts, parameter = [(gate, (0, half[0])), (up, (half[0], outer))], "gate_up_proj"
            elif (outer, inner) == lower:
                parts, parameter = [(down, (0, outer))], "down_proj"
            else:
                break
            scale = self._scale(f"{path}.{parameter}", self._rank(module, ranks, count))
            for expert in range(count):
                for name, rows in parts:
                    target = f"{stem}.{expert}.{name}.weight"
                    yield Placed(target, "low_rank", module, (b, a), scale, experts=count, expert=expert, rows=rows)
            return
        self._misfit(module, (outer, inner), None)

    def _rank(self, module: str, ranks: int, experts: int) -> int:
        if ranks % experts:
            raise RunError(Code.ADAPTER_INVALID, f"{module}: {ranks} rows of lora_A are no ranks of {experts} experts")
        return ranks // experts

    def _scale(self, path: str, rank: int) -> float:
        """As peft finds it: the first name of ``alpha_pattern`` that fits the end of the path counts."""
        alpha = float(self._config.get("lora_alpha", ALPHA))
        for name, value in (self._config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({name})$", path):
                alpha = float(value)
                break
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _misfit(self, module: str, wanted: tuple[int, ...], found: tuple[int, ...] | None) -> None:
        has = f"has {list(found)}" if found else "has no such module"
        raise RunError(
            Code.BASE_MISMATCH,
            f"{module}: the adapter was made for a weight of {list(wanted)}, the base {has}",
            param="base_model",
        )


def embedding_of(base: Headers) -> str | None:
    """The stored name of a model's word embedding."""
    known = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
    return next((name for name in base if name.endswith(known)), None)
