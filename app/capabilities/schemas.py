"""What the service can do, as the API shows it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class PlugOut(BaseModel):
    """Something that is plugged in."""

    name: str
    description: str = Field(description="What its spec says about itself.")


class AlgorithmOut(PlugOut):
    """A training algorithm."""

    learning_rate: dict[Literal["adapter", "full"], float] = Field(description="The defaults.")
    metrics: dict[str, Literal["lower", "higher"]] = Field(
        description="Numbers of its evaluations, and which way is better; the first is what the best checkpoint has."
    )
    judged: bool = Field(description="Whether it needs reward_model or graders.")


class InstalledOut(BaseModel):
    """Something that works where its library is installed."""

    name: str
    installed: bool
    needs: str | None = Field(None, description="What must be installed; absent = nothing.")


class PrecisionOut(BaseModel):
    """A compute dtype, and what becomes of it."""

    name: str
    gpu: str = Field(description="What a GPU computes in.")
    cpu: str = Field(description="What a CPU computes in.")


class TargetsOut(BaseModel):
    """What a target preset means for an architecture."""

    model_types: list[str] = Field(description="As config.json calls them.")
    minimal: list[str]
    standard: list[str]
    full: list[str] = Field(description="Modules, and the parameters that hold a layer's experts.")


class CellOut(BaseModel):
    """One combination of algorithm, method, quantisation, precision and parallelism."""

    algorithm: str
    method: str
    quantization: str
    precision: str
    parallelism: str
    possible: bool
    needs: str | None = Field(None, description="Hardware that it asks for, and what happens without.")
    reason: str | None = Field(None, description="Why it is refused.")
    param: str | None = Field(None, description="The field at fault.")
    hint: str | None = None


_SFT = {"algorithm": "sft", "quantization": "nf4", "precision": "bfloat16", "parallelism": "alone"}
EXAMPLE: dict[str, Any] = {
    "object": "capabilities",
    "algorithms": [
        {
            "name": "sft",
            "description": "Supervised fine-tuning.",
            "learning_rate": {"adapter": 2e-4, "full": 2e-5},
            "metrics": {"eval_loss": "lower", "eval_mean_token_accuracy": "higher"},
            "judged": False,
        }
    ],
    "methods": {"lora": {"peft_config": {}}, "full": {"use_peft": False}},
    "quantizations": {"none": {}, "nf4": {"quantization_config": {"bnb_4bit_quant_type": "nf4"}}},
    "precisions": [{"name": "float32", "gpu": "float32", "cpu": "float32"}],
    "parallelism": ["alone", "ddp", "fsdp"],
    "presets": {"conservative": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1}},
    "target_presets": [
        {
            "model_types": ["phi3"],
            "minimal": ["qkv_proj"],
            "standard": ["qkv_proj", "o_proj"],
            "full": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        }
    ],
    "inits": ["gaussian", "pissa", "olora"],
    "graders": [{"name": "string_check", "description": "1 when the comparison holds, else 0."}],
    "trackers": [{"name": "tensorboard", "installed": True}, {"name": "wandb", "installed": False, "needs": "wandb"}],
    "merge_methods": ["lora"],
    "engines": [{"name": "vllm", "installed": True, "needs": "TUNESMITH_SERVE_PYTHON"}],
    "job_types": ["train", "merge", "validate", "deploy"],
    "cells": [
        {
            **_SFT,
            "method": "lora",
            "possible": True,
            "needs": "a GPU that computes in bfloat16; elsewhere float32 takes its place (dtype_replaced)",
        },
        {
            **_SFT,
            "method": "full",
            "possible": False,
            "reason": "a 4-bit base cannot be trained in full",
            "param": "model.quantization_config",
            "hint": "Set use_peft: true for QLoRA, or remove quantization_config.",
        },
    ],
}


class CapabilitiesOut(BaseModel):
    """Everything that is plugged in, and what of it goes together."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})
    object: Literal["capabilities"] = "capabilities"
    algorithms: list[AlgorithmOut]
    methods: dict[str, dict[str, Any]] = Field(description="What the block model says for each.")
    quantizations: dict[str, dict[str, Any]] = Field(description="What the block model says for each.")
    precisions: list[PrecisionOut]
    parallelism: list[str]
    presets: dict[str, dict[str, float]] = Field(description="peft_config.preset.")
    target_presets: list[TargetsOut]
    inits: list[str] = Field(description="peft_config.init_lora_weights, beside true and false.")
    graders: list[PlugOut]
    trackers: list[InstalledOut]
    merge_methods: list[str]
    engines: list[InstalledOut]
    job_types: list[str]
    cells: list[CellOut] = Field(description="The table; every cell that is possible is tried by `make matrix`.")
