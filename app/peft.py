"""How a training spec says what of a model is trained: the blocks ``peft_config`` and ``quantization_config``."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from app.blocks import Dtype, Spec, conflict
from app.targets import ALL_LINEAR, PRESETS

PEFT_PRESETS: dict[str, dict[str, int | float]] = {
    "conservative": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1},
    "balanced": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1},
    "aggressive": {"r": 32, "lora_alpha": 64, "lora_dropout": 0.05},
}
INITS = ("gaussian", "orthogonal", "olora", "pissa", "pissa_niter_<n>", "mica")
_NITER = re.compile(r"pissa_niter_(\d{1,3})")
# peft knows these too, but each needs a pass over data, or quantises the model itself, before training.
_ELSEWHERE = {
    "eva": "the inputs of each layer, gathered from data beforehand",
    "corda": "the covariances of each layer, gathered from data beforehand",
    "lora_ga": "the gradients of each weight, gathered from data beforehand",
    "loftq": "weights that it quantises itself; QLoRA here quantises with bitsandbytes",
}
ModuleName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")]

# Config keys of variants of LoRA whose product is not W + scale · B · A, and what they are called.
VARIANTS = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "monteclora_config": "MonteCLoRA",
    "trainable_token_indices": "trainable tokens",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}
# Starts that put a part of the base into the adapter: added to the whole base, that part would count twice.
MOVING_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")


class PeftBlock(Spec):
    """The guide's ``peft_config``: the fields of peft's ``LoraConfig``."""

    preset: Literal["conservative", "balanced", "aggressive"] | None = Field(
        None, description="r/alpha/dropout 8/16/0.1, 16/32/0.1 or 32/64/0.05; fields given beside it win."
    )
    r: int = Field(16, ge=1, le=512, description="Rank of the adapter.")
    lora_alpha: int | None = Field(None, ge=1, le=4096, description="Scale; default 2 r.")
    lora_dropout: float = Field(0.1, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: list[Annotated[str, Field(min_length=1, max_length=128)]] | str = Field(
        "standard", description='Module names, or "all-linear", or a preset: minimal, standard, full.'
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained too.")
    use_rslora: bool = Field(False, description="Scale by alpha/sqrt(r) (rank-stabilised LoRA).")
    use_dora: bool = Field(False, description="Weight-decomposed LoRA: length and direction are trained apart.")
    rank_pattern: dict[ModuleName, Annotated[int, Field(ge=1, le=512)]] = Field(
        default_factory=dict, max_length=1000, description="Other ranks, by module name or the end of its path."
    )
    alpha_pattern: dict[ModuleName, Annotated[int, Field(ge=1, le=4096)]] = Field(
        default_factory=dict, max_length=1000, description="Other alphas, by module name or the end of its path."
    )
    modules_to_save: list[ModuleName] | None = Field(
        None, min_length=1, max_length=64, description="Modules trained and stored whole."
    )
    init_lora_weights: bool | str = Field(
        True,
        description="How the adapter begins: true (no change), false (random), gaussian, orthogonal, olora, pissa, "
        "pissa_niter_<n>, mica.",
    )
    task_type: Literal["CAUSAL_LM"] = Field("CAUSAL_LM", description="As in peft; only CAUSAL_LM.")

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        preset = data.get("preset") if isinstance(data, dict) else None
        return {**PEFT_PRESETS.get(preset, {}), **data} if isinstance(preset, str) else data

    @model_validator(mode="after")
    def _fill(self) -> Self:
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if isinstance(self.target_modules, list) and not self.target_modules:
            raise conflict("target_modules", "target_modules is empty", "Name at least one module, or use 'standard'.")
        if isinstance(self.target_modules, str) and self.target_modules not in (*PRESETS, ALL_LINEAR):
            raise conflict(
                "target_modules",
                f"target_modules does not take {self.target_modules!r}",
                "Give a list of module names, or 'all-linear', 'minimal', 'standard' or 'full'.",
            )
        return self

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        start = self.init_lora_weights
        if isinstance(start, bool):
            return self
        if start in _ELSEWHERE:
            raise conflict(
                "init_lora_weights", f"{start} needs {_ELSEWHERE[start]}", f"Take true, or one of {', '.join(INITS)}."
            )
        if start not in INITS and not _NITER.fullmatch(start) or start == "pissa_niter_<n>":
            raise conflict(
                "init_lora_weights",
                f"init_lora_weights does not take {start[:64]!r}",
                f"Write true, false or one of {', '.join(INITS)}.",
            )
        odd = [rank for rank in (self.r, *self.rank_pattern.values()) if rank % 2]
        if start == "orthogonal" and odd:
            raise conflict("init_lora_weights", f"orthogonal needs even ranks, and {odd[0]} is odd", "Make r even.")
        if start == "mica" and self.use_dora:
            raise conflict("init_lora_weights", "mica and use_dora exclude each other", "Keep one of them.")
        return self

    @property
    def start(self) -> str:
        """``init_lora_weights`` without numbers: true, false, gaussian, pissa, …"""
        return str(self.init_lora_weights).lower().split("_")[0]

    @property
    def moves_base(self) -> bool:
        """Whether the adapter begins with a part of the base's weights, which are changed to make up for it."""
        return self.start in ("pissa", "olora")

    @property
    def variant(self) -> str:
        """What people call it: dora, pissa, olora, rslora or lora."""
        if self.use_dora:
            return "dora"
        if self.moves_base:
            return self.start
        return "rslora" if self.use_rslora else "lora"


class QuantizationBlock(Spec):
    """The guide's ``quantization_config``: present means QLoRA (bitsandbytes, 4 bit)."""

    load_in_4bit: Literal[True] = Field(True, description="QLoRA is 4 bit.")
    bnb_4bit_compute_dtype: Dtype = Field("bfloat16", description="Replaced by float32 where the hardware lacks it.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True


def check_quantised(peft: PeftBlock) -> None:
    """What a 4-bit base cannot take. Raises a conflict."""
    reasons = {
        "pissa": "PiSSA moves a part of the base's weights into the adapter, and a 4-bit base cannot give it exactly",
        "olora": "OLoRA moves a part of the base's weights into the adapter, and a 4-bit base cannot give it exactly",
        "mica": "MiCA is worked out from the base's weights, which are not at hand in 4 bit",
        "orthogonal": "peft makes the orthogonal start in the base's dtype, and 4 bit is none that is trained",
    }
    if reason := reasons.get(peft.start):
        raise conflict(
            "peft_config.init_lora_weights", reason, "Leave init_lora_weights out, or remove quantization_config."
        )


def check_reference(peft: PeftBlock, algorithm: str) -> None:
    """What an algorithm cannot take that compares the model with itself without the adapter. Raises a conflict."""
    same = f"{algorithm} compares the model with itself without the adapter, which must be the model that it began with"
    if peft.bias != "none":
        raise conflict("model.peft_config.bias", f"{same}; biases are changed in the model itself", "Leave bias out.")
    if peft.start in ("false", "orthogonal", "olora", "pissa"):
        raise conflict(
            "model.peft_config.init_lora_weights",
            f"{same}; with init_lora_weights: {str(peft.init_lora_weights).lower()} it is not",
            "Leave init_lora_weights out, or take gaussian.",
        )
