"""Job specs: what a ``POST /jobs`` body may say, typed and bounded.

Field names are those of the guide's ``config.yaml``, of peft's ``LoraConfig`` and of transformers'
``TrainingArguments``. A recipe or an operation subclasses ``TrainSpec`` or ``JobSpec`` in its own file.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from app.blocks import (
    MODEL_GRAMMAR,
    NAME_PATTERN,
    AdapterRef,
    Dtype,
    FileRef,
    ModelRef,
    Name,
    RefTo,
    RewardRef,
    Spec,
    conflict,
)
from app.peft import PEFT_PRESETS, PeftBlock, QuantizationBlock, check_quantised, check_reference
from app.serving import DeploymentOptions, LoraRank, take_resources
from app.training import Better, DatasetBlock, EarlyStopping, TrainingBlock

__all__ = [
    "MODEL_GRAMMAR",
    "NAME_PATTERN",
    "AdapterRef",
    "Better",
    "DatasetBlock",
    "DeploySpec",
    "DeploymentOptions",
    "Dtype",
    "EarlyStopping",
    "FileRef",
    "FollowUp",
    "JobSpec",
    "Limits",
    "LoraRank",
    "ModelBlock",
    "ModelRef",
    "Name",
    "PEFT_PRESETS",
    "PeftBlock",
    "QuantizationBlock",
    "RefTo",
    "Resources",
    "RetryPolicy",
    "RewardRef",
    "ServeSpec",
    "Spec",
    "TrainSpec",
    "TrainingBlock",
    "conflict",
]


class Resources(Spec):
    """What a job asks of the machine."""

    gpus: int = Field(1, ge=0, le=64, description="GPUs for the job; without a GPU in the machine it runs on the CPU.")
    min_vram_gb: float | None = Field(None, gt=0, le=4096, description="Memory that each GPU must have, in GB.")


class Limits(Spec):
    """When a job is given up, in seconds."""

    wall_seconds: float | None = Field(
        None, gt=0, le=31_536_000, description="Longest time in slots, over all attempts; then it fails."
    )
    queue_seconds: float | None = Field(
        None, gt=0, le=31_536_000, description="Longest wait for its first slot, once nothing else is missing."
    )
    stall_seconds: float | None = Field(
        None, ge=1, le=86_400, description="Longest silence of a run; then it is ended and tried again. Default 1800."
    )


class RetryPolicy(Spec):
    """What happens when a run breaks off by itself. Errors of data or spec are never tried again."""

    max_attempts: int = Field(3, ge=1, le=20, description="Attempts in a row without a newer checkpoint.")
    backoff_seconds: float = Field(5.0, ge=0, le=3600, description="Pause before the second; doubles each time.")
    exit_codes: list[Annotated[int, Field(ge=1, le=255)]] | None = Field(
        None, max_length=32, description="Try again only after these exit statuses; default: after any crash."
    )


class JobSpec(Spec):
    """What every job type has in common."""

    type: str
    experiment_name: Name | None = Field(None, description="Name of the run and of its outputs; made up when omitted.")
    metadata: dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]] = Field(
        default_factory=dict, max_length=16, description="Your own labels, at most 16."
    )
    priority: int = Field(0, ge=-100, le=100, description="Higher first.")
    resources: Resources = Field(default_factory=Resources)
    limits: Limits = Field(default_factory=Limits)
    retry: RetryPolicy = Field(default_factory=RetryPolicy)
    preemptible: bool = Field(False, description="A job of higher priority may pause this one and take its slot.")
    takes_adapters: ClassVar[bool] = False
    """Whether a model field may lead to an adapter."""
    asks_served: ClassVar[bool] = False
    """Whether ``deployment``, where it is set, names what is asked in place of the files behind ``model``."""

    def default_name(self) -> str:
        """The experiment name for a spec that gives none (a date is appended by the service)."""
        return self.type


class ModelBlock(Spec):
    """The guide's ``model`` block."""

    model_name_or_path: ModelRef
    revision: str | None = Field(None, max_length=128, description="Commit, branch or tag of a hub model.")
    use_peft: bool = Field(True, description="false = full fine-tune; then peft_config must be absent.")
    peft_config: PeftBlock | None = None
    quantization_config: QuantizationBlock | None = None
    dtype: Dtype | None = Field(
        None, description="Compute dtype; default by hardware (bfloat16 where it is fast, else float32)."
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="auto = flash attention on a GPU where it is installed, else SDPA."
    )
    aliases: ClassVar[dict[str, str]] = {"torch_dtype": "dtype"}

    @model_validator(mode="after")
    def _peft_and_full(self) -> Self:
        if not self.use_peft:
            if self.peft_config is not None:
                raise conflict(
                    "peft_config",
                    "peft_config has no meaning when use_peft is false",
                    "Remove peft_config for a full fine-tune, or set use_peft: true.",
                )
            if self.quantization_config is not None:
                raise conflict(
                    "quantization_config",
                    "a 4-bit base cannot be trained in full",
                    "Set use_peft: true for QLoRA, or remove quantization_config.",
                )
        elif self.peft_config is None:
            self.peft_config = PeftBlock()
        if self.peft_config is not None and self.quantization_config is not None:
            check_quantised(self.peft_config)
        return self

    @property
    def method(self) -> str:
        """How the weights are trained: full, or lora, rslora, dora, pissa, olora; qlora, qdora … on a 4-bit base."""
        if self.peft_config is None:
            return "full"
        return ("q" if self.quantization_config else "") + self.peft_config.variant


FollowUp = Literal["merge", "validate", "deploy"]


class TrainSpec(JobSpec):
    """What every training algorithm has in common; a recipe's spec adds ``algorithm`` and its own fields."""

    type: Literal["train"] = "train"
    algorithm: str
    model: ModelBlock
    dataset: DatasetBlock
    training: TrainingBlock = Field(default_factory=TrainingBlock)
    then: list[FollowUp] = Field(
        default_factory=list, max_length=3, description="Follow-ups, each a job of its own, in this order."
    )
    from_checkpoint: str | None = Field(
        None,
        max_length=64,
        description="Goes on from this checkpoint (`ftckpt-…`) of a run of the same algorithm, model and dataset.",
    )
    trackers: list[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]] = Field(
        default_factory=list,
        max_length=8,
        description="Where else the run's numbers go, of those that GET /capabilities lists as installed.",
    )
    learning_rates: ClassVar[tuple[float, float]] = (2e-4, 2e-5)
    """Defaults with an adapter, and in full."""
    eval_metrics: ClassVar[dict[str, Better]] = {"eval_loss": "lower"}
    """Numbers of an evaluation that runs can be compared by, and which way is better; the first is the default."""
    takes_adapters: ClassVar[bool] = True
    shards: ClassVar[bool] = False
    """Whether the recipe can train weights that lie in parts on several GPUs (FSDP)."""
    several: ClassVar[bool] = True
    """Whether the recipe can be run by several processes at once, a GPU each."""
    judged: ClassVar[bool] = False
    """Whether answers are judged, by ``reward_model`` or by ``graders``: one of the two is needed."""
    smallest: ClassVar[dict[str, Any]] = {}
    """What the smallest spec says beside ``model`` and ``dataset``; GET /capabilities tries what goes with it."""
    needs_template: ClassVar[bool] = False
    """Whether conversations can be learnt through the model's chat template alone."""
    packs: ClassVar[bool] = False
    """Whether several rows can share a block."""
    offloads: ClassVar[bool] = False
    """Whether activations can wait in the host's memory."""
    by_trainer: ClassVar[bool] = True
    """Whether transformers' trainer runs it, with its optimizers and kernels."""
    needs_reference: ClassVar[bool] = False
    """Whether the model without its adapter is what the run compares itself with."""

    @property
    def spread(self) -> Literal["alone", "ddp", "fsdp"]:
        """How the run lies on its GPUs."""
        if self.resources.gpus < 2:
            return "alone"
        if self.training.parallelism == "auto":
            return "fsdp" if self.shards and self.model.method == "full" else "ddp"
        return self.training.parallelism

    @model_validator(mode="after")
    def _check_parallelism(self) -> Self:
        field, kind = "training.parallelism", self.training.parallelism
        if self.resources.gpus > 1 and not self.several:
            raise conflict("resources.gpus", f"{self.algorithm} runs on one GPU", "Set resources.gpus to 1.")
        if kind != "auto" and self.resources.gpus < 2:
            raise conflict(field, f"{kind} spreads a run over several GPUs", "Set resources.gpus to 2 or more.")
        if kind == "fsdp" and not self.shards:
            raise conflict(field, f"{self.algorithm} needs the whole model on each GPU", "Use ddp, or leave it out.")
        if kind == "fsdp" and self.model.quantization_config is not None:
            raise conflict(field, "4-bit weights cannot be cut into parts here", "Use ddp, or LoRA without 4 bit.")
        return self

    @model_validator(mode="after")
    def _check_speed(self) -> Self:
        block = self.training
        wrong = {
            "packing": block.packing is True and not self.packs,
            "activation_offloading": block.activation_offloading and not self.offloads,
        }
        for name in () if self.by_trainer else ("optim", "use_liger_kernel", "torch_compile"):
            wrong[name] = getattr(block, name) != TrainingBlock.model_fields[name].default
        for name in (name for name, is_wrong in wrong.items() if is_wrong):
            raise conflict(f"training.{name}", f"{self.algorithm} cannot make use of {name}", f"Leave {name} out.")
        return self

    @model_validator(mode="after")
    def _check_reference(self) -> Self:
        if self.needs_reference and self.model.peft_config is not None:
            check_reference(self.model.peft_config, self.algorithm)
        return self

    @model_validator(mode="after")
    def _fill_by_method(self) -> Self:
        whole = self.model.method == "full"
        if self.training.learning_rate is None:
            adapter, full = self.learning_rates
            self.training.learning_rate = full if whole else adapter
        if self.training.save_total_limit is None and whole:
            self.training.save_total_limit = 2
        return self

    @model_validator(mode="after")
    def _check_evaluation(self) -> Self:
        dataset, training = self.dataset, self.training
        if dataset.eval_file and dataset.eval_split:
            raise conflict(
                "dataset.eval_split", "the held-out rows come from eval_file or from a split, not both", "Keep one."
            )
        if training.eval_strategy != "no" and not (dataset.eval_file or dataset.eval_split):
            raise conflict(
                "dataset.eval_file",
                "there are no held-out rows to evaluate on",
                "Add dataset.eval_file, or dataset.eval_split: 0.05.",
            )
        if training.eval_strategy == "no" and (training.early_stopping or training.load_best_model_at_end):
            wanting = "early_stopping" if training.early_stopping else "load_best_model_at_end"
            raise conflict("training.eval_steps", f"{wanting} needs evaluations", "Add training.eval_steps, e.g. 50.")
        if training.max_seconds and self.limits.wall_seconds and training.max_seconds >= self.limits.wall_seconds:
            raise conflict(
                "training.max_seconds",
                "limits.wall_seconds would fail the job before training.max_seconds ends it well",
                "Make limits.wall_seconds longer by what saving takes, or leave it out.",
            )
        self._choose_metric()
        return self

    def _choose_metric(self) -> None:
        training, stopping = self.training, self.training.early_stopping
        asked = {
            name: metric if metric.startswith("eval_") else f"eval_{metric}"
            for name, metric in (
                ("early_stopping.metric", stopping.metric if stopping else None),
                ("metric_for_best_model", training.metric_for_best_model),
            )
            if metric is not None
        }
        for name, metric in asked.items():
            if metric not in self.eval_metrics:
                known = ", ".join(self.eval_metrics)
                raise conflict(f"training.{name}", f"{self.algorithm} measures no {metric}", f"One of: {known}.")
        if len(set(asked.values())) > 1:
            raise conflict(
                "training.early_stopping.metric",
                "early_stopping.metric and metric_for_best_model name two metrics",
                "Keep one of them.",
            )
        chosen = next(iter(asked.values()), next(iter(self.eval_metrics)))
        training.metric_for_best_model = chosen
        if stopping:
            stopping.metric = chosen
        if training.load_best_model_at_end is None:
            training.load_best_model_at_end = stopping is not None

    @model_validator(mode="after")
    def _check_then(self) -> Self:
        order = ["merge", "validate", "deploy"]
        if [step for step in order if step in self.then] != self.then:
            raise conflict(
                "then", "then has its steps out of order", "Write merge, validate, deploy, each at most once."
            )
        if "merge" in self.then and not self.model.use_peft:
            raise conflict("then", "a full fine-tune leaves no adapter to merge", "Remove merge from then.")
        return self

    def default_name(self) -> str:
        """``sft_qwen2.5-7b_lora_r16_alpha32``: algorithm, model, method, rank."""
        model = self.model.model_name_or_path.rstrip("/").split("/")[-1].split(":")[-1].lower()
        parts = [self.algorithm, model.removesuffix("-instruct"), self.model.method]
        if self.model.peft_config:
            parts += [f"r{self.model.peft_config.r}", f"alpha{self.model.peft_config.lora_alpha}"]
        return "_".join(parts)


class DeploySpec(JobSpec, DeploymentOptions):
    """Serve a model or an adapter: the job succeeds when it answers for the first time under its name.

    An adapter is loaded into a deployment of its base where that can be, else it is merged first.
    """

    type: Literal["deploy"] = "deploy"
    model: ModelRef
    name: Name = Field(description="The model name that clients ask for.")
    takes_adapters: ClassVar[bool] = True

    @model_validator(mode="after")
    def _resources(self) -> Self:
        if "resources" in self.model_fields_set:
            take_resources(self, self.resources)
        return self


class ServeSpec(JobSpec, DeploymentOptions):
    """One replica of a deployment: internal, made by the service, hidden from lists."""

    type: Literal["serve"] = "serve"
    model: ModelRef
    name: Name
    deployment_id: str
