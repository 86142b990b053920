"""What may be said of a deployment's engine."""

from typing import Literal

from pydantic import Field

from app.blocks import Spec, conflict
from app.parsers import ReasoningParser, ToolParser

MOST_GPUS = 8
OnlineQuantization = Literal["fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "mxfp8"]
"""Of vLLM's ``--quantization`` those that need no other files than the model's own. Models that are stored in fewer
bits say so themselves."""
LoraRank = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]
"""The sizes that vLLM makes room for."""


class DeploymentOptions(Spec):
    """What may be said about the engine: a typed list, never a command line."""

    engine: str = Field(
        "auto",
        pattern=r"^[a-z][a-z0-9_]{0,31}$",
        description="Which engine file serves the model; auto = vllm, where there is none transformers.",
    )
    task: Literal["generate", "embed"] = Field(
        "generate",
        description="generate = the model answers: chats, completions; embed = `/v1/embeddings` and nothing else, by "
        "vLLM, of an embedding model or of the last token of any other.",
    )
    max_model_len: int | None = Field(None, ge=16, le=1_048_576, description="Longest prompt plus answer in tokens.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field("auto", description="auto = by hardware.")
    gpu_memory_utilization: float = Field(0.9, gt=0.05, le=0.98, description="Share of a GPU that the engine may take.")
    tensor_parallel_size: int = Field(1, ge=1, le=MOST_GPUS, description="GPUs that share one replica.")
    min_vram_gb: float | None = Field(
        None, gt=0, le=4096, description="Memory that each of its GPUs must have, in GB; null = any."
    )
    quantization: OnlineQuantization | None = Field(
        None,
        description="Fewer bits a weight, made when vLLM loads the model on a GPU; null = as the model is stored.",
    )
    replicas: int = Field(
        1, ge=1, le=16, description="Copies of the engine; each takes a slot, and a request goes to the least busy one."
    )
    start_timeout: int = Field(600, ge=10, le=7200, description="Seconds until a start counts as failed.")
    idle_timeout: int | None = Field(
        None,
        ge=1,
        le=2_592_000,
        description="Seconds without a request after which the engine sleeps or ends; the next wakes it.",
    )
    yields: bool = Field(
        True, description="Whether an idle engine on a GPU sleeps when a job finds no other slot; a request wakes it."
    )
    hot_load: bool | None = Field(
        None,
        description="Whether adapters can be loaded while it serves; default: when the model was not trained here.",
    )
    parity: Literal["required", "warn", "off"] = Field(
        "required",
        description="When it is ready, its answers are read by transformers; required = an engine that says something "
        "else than the model fails the deployment, warn = it goes on. What cannot be measured fails nothing.",
    )
    tool_call_parser: ToolParser = Field(
        "auto", description="vLLM's parser for calls of tools; auto = by the model's chat template, none = no tools."
    )
    reasoning_parser: ReasoningParser = Field(
        "auto",
        description="vLLM's parser for thoughts; auto = by the model's chat template, none = part of the answer.",
    )
    max_lora_rank: LoraRank = Field(64, description="Largest rank of an adapter; the engine keeps room for it.")
    max_loras: int = Field(4, ge=1, le=64, description="Adapters that can share one batch.")
    max_adapters: int = Field(
        16, ge=1, le=1024, description="Adapters kept loaded; beyond that the least recently used one is put away."
    )

    def contradiction(self) -> tuple[str, str] | None:
        """The name of an option that means nothing beside ``task: embed``, and why."""
        if self.task != "embed":
            return None
        if self.hot_load:
            return "hot_load", "adapters are loaded into engines that answer"
        parsers = {name: getattr(self, name) for name in ("tool_call_parser", "reasoning_parser")}
        found = next((name for name, value in parsers.items() if value not in ("auto", "none")), None)
        return (found, "there is nothing to read in an embedding") if found else None


class EngineResources(Spec):
    """GPUs of one replica, as jobs ask for theirs: ``tensor_parallel_size`` and ``min_vram_gb``."""

    gpus: int = Field(1, ge=1, le=MOST_GPUS, description="GPUs that share one replica.")
    min_vram_gb: float | None = Field(None, gt=0, le=4096, description="Memory that each of them must have, in GB.")


_SAME = {"gpus": "tensor_parallel_size", "min_vram_gb": "min_vram_gb"}
"""What is said of resources, by the options' names."""


def take_resources(options: DeploymentOptions, resources: Spec) -> None:
    """What ``resources`` says of GPUs, as options. Raises a conflict when those say something else."""
    for name in sorted(_SAME.keys() & resources.model_fields_set):
        field, option, value = f"resources.{name}", _SAME[name], getattr(resources, name)
        if name == "gpus" and not 1 <= value <= MOST_GPUS:
            raise conflict(
                field, f"an engine takes 1 to {MOST_GPUS} GPUs", f"Set {field} to a number from 1 to {MOST_GPUS}."
            )
        if option in options.model_fields_set and getattr(options, option) != value:
            raise conflict(field, f"it differs from {option}", "Say one of them: they mean the same.")
        setattr(options, option, value)
