"""Scale and orientation of an adapter's changes, read a second time and from other signs than the writer went by.

The writer takes the rank from the factors and the orientation from a list of architectures. Here the rank is what the
adapter's config says of it, and the orientation what the base's shapes show: a bias has a value for each output.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from app.errors import Code, RunError
from workers.loading.layout import Headers, Placed

# peft's own values of what a config leaves out.
_DEFAULTS = {"r": 8, "lora_alpha": 8}
_DOWN = ("down_proj", "down_proj.weight", "w2.weight")


class SecondReading:
    """Of one adapter and its base."""

    def __init__(self, config: Mapping[str, Any], tensors: Headers, base: Headers, hidden: int | None) -> None:
        """``hidden``: the width of the base's layers, from its config."""
        self._config = _DEFAULTS | dict(config)
        self._tensors = tensors
        self._base = base
        self._hidden = hidden
        self._input_first = _shown(base, (name for name in base if name.endswith(".weight")))

    def of(self, placed: Placed) -> Placed:
        """The same thing with a scale and an orientation of our own. Raises RunError adapter_invalid."""
        if placed.kind == "whole":
            return placed
        if placed.kind == "bias":
            return placed._replace(scale=self._scale(placed.module, None))
        b, a = (self._tensors[name].shape for name in placed.names)
        if placed.experts > 1:
            path = placed.module.replace(".base_layer", "")
            path += ".down_proj" if placed.target.endswith(_DOWN) else ".gate_up_proj"
            scale = self._scale(path, a[0] // placed.experts)
        else:
            scale = self._scale(placed.module, a[0])
        embedding = placed.names[0].endswith("lora_embedding_B")
        return placed._replace(scale=scale, transposed=embedding or self._transposed(placed, b[0], a[1]))

    def _scale(self, path: str, rank: int | None) -> float:
        said, alpha = (
            self._fitting(*names, path) for names in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        if rank is not None and said != rank:
            raise RunError(
                Code.ADAPTER_INVALID,
                f"{path}: the adapter's config says rank {said:g}, its factors have {rank}",
                hint="Take adapter_config.json and weights from one and the same training.",
                param="adapter",
            )
        return alpha / said**0.5 if self._config.get("use_rslora") else alpha / said

    def _fitting(self, patterns: str, otherwise: str, path: str) -> float:
        """The value of the first pattern that the path ends with, from the beginning of a name on."""
        for pattern, value in (self._config.get(patterns) or {}).items():
            if re.fullmatch(f"(?:.*[.])?(?:{pattern})", path):
                return float(value)
        return float(self._config[otherwise])

    def _transposed(self, placed: Placed, outputs: int, inputs: int) -> bool:
        shape = self._base[placed.target].shape if placed.target in self._base else (outputs, inputs)
        if placed.rows is not None or placed.expert is not None:
            return False  # experts stored one by one are linear layers
        if shape[-2] != shape[-1]:
            return shape[-2:] == (inputs, outputs)
        if placed.experts == 1:
            return self._input_first
        return self._experts_transposed(placed)

    def _experts_transposed(self, placed: Placed) -> bool:
        """Of square experts, by those beside them: gate and up together are never square where down is."""
        beside = self._base.get(placed.target.replace("down_proj", "gate_up_proj"))
        if beside is None or self._hidden is None or beside.shape[1] == beside.shape[2]:
            return placed.transposed
        return beside.shape[1] == self._hidden


def _shown(base: Headers, weights: Iterable[str]) -> bool:
    """Whether the base's layers are stored (in, out): then a bias is as long as its matrix is wide."""
    for name in weights:
        bias, shape = base.get(f"{name.removesuffix('.weight')}.bias"), base[name].shape
        if bias is not None and len(shape) == 2 and len(bias.shape) == 1 and shape[0] != shape[1]:
            return bias.shape[0] == shape[1]
    return False
