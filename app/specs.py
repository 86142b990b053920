"""Job specs: what a ``POST /jobs`` body may say, typed and bounded.

Field names are those of the guide's ``config.yaml``, of peft's ``LoraConfig`` and of transformers'
``TrainingArguments``. A recipe or an operation subclasses ``TrainSpec`` or ``JobSpec`` in its own file.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN, description="Letters, digits, dot, dash, underscore; at most 63.")]


class RefTo:
    """Marks a string field that points to a model, an adapter or a file, so that the service can resolve it."""

    def __init__(self, kind: Literal["model", "adapter", "reward", "file"]) -> None:
        self.kind = kind


MODEL_GRAMMAR = "artifact:<id>, job:<id>, hub:<repo>[@rev], a path, a registered name[:vN], or a hub id"
ModelRef = Annotated[str, RefTo("model"), Field(min_length=1, max_length=512, description=f"A model: {MODEL_GRAMMAR}.")]
AdapterRef = Annotated[
    str, RefTo("adapter"), Field(min_length=1, max_length=512, description=f"An adapter: {MODEL_GRAMMAR}.")
]
FileRef = Annotated[str, RefTo("file"), Field(min_length=1, max_length=128, description="Id of an uploaded file.")]
Dtype = Literal["float32", "float16", "bfloat16"]


def conflict(field: str, message: str, hint: str) -> PydanticCustomError:
    """What a cross-field rule raises: which field is at fault, and what to do."""
    return PydanticCustomError("conflict", "{reason}", {"field": field, "reason": message, "hint": hint})


class Spec(BaseModel):
    """A part of a spec: strict types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    # Older names that still work: {old: new}. Accepted without effect, and refused with the field to use instead.
    aliases: ClassVar[dict[str, str]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[dict[str, str]] = {}


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

    def default_name(self) -> str:
        """The experiment name for a spec that gives none (a date is appended by the service)."""
        return self.type


TARGET_PRESETS = {
    "minimal": ["q_proj", "v_proj"],
    "standard": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "full": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
PEFT_PRESETS: dict[str, dict[str, int | float]] = {
    "conservative": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1},
    "balanced": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1},
    "aggressive": {"r": 32, "lora_alpha": 64, "lora_dropout": 0.05},
}


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
    use_dora: bool = Field(False, description="Weight-decomposed LoRA.")
    modules_to_save: list[str] | None = Field(None, description="Modules trained and stored whole.")
    task_type: Literal["CAUSAL_LM"] = Field("CAUSAL_LM", description="As in peft; only CAUSAL_LM.")

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("preset") in PEFT_PRESETS:
            return {**PEFT_PRESETS[data["preset"]], **data}
        return data

    @model_validator(mode="after")
    def _fill(self) -> Self:
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if isinstance(self.target_modules, list) and not self.target_modules:
            raise conflict("target_modules", "target_modules is empty", "Name at least one module, or use 'standard'.")
        if isinstance(self.target_modules, str) and self.target_modules not in (*TARGET_PRESETS, "all-linear"):
            raise conflict(
                "target_modules",
                f"target_modules does not take {self.target_modules!r}",
                "Give a list of module names, or 'all-linear', 'minimal', 'standard' or 'full'.",
            )
        return self

    def module_names(self) -> list[str] | Literal["all-linear"]:
        """The presets spelled out, as peft takes them."""
        if isinstance(self.target_modules, str):
            return "all-linear" if self.target_modules == "all-linear" else TARGET_PRESETS[self.target_modules]
        return self.target_modules


class QuantizationBlock(Spec):
    """The guide's ``quantization_config``: present means QLoRA (bitsandbytes, 4 bit)."""

    load_in_4bit: Literal[True] = Field(True, description="QLoRA is 4 bit.")
    bnb_4bit_compute_dtype: Dtype = Field("bfloat16", description="Replaced by float32 where the hardware lacks it.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True


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
        return self

    @property
    def method(self) -> Literal["lora", "qlora", "full"]:
        """How the weights are trained."""
        if not self.use_peft:
            return "full"
        return "qlora" if self.quantization_config else "lora"


class DatasetBlock(Spec):
    """Which uploaded file to learn from."""

    file: FileRef
    eval_file: FileRef | None = Field(None, description="Held-out rows; loss is measured on them.")
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "preference", "prompt"] = Field(
        "auto", description="Shape of a row; auto looks at the fields."
    )


class TrainingBlock(Spec):
    """Names and meaning of transformers' ``TrainingArguments`` (and trl's ``SFTConfig`` for ``max_length``)."""

    max_steps: int | None = Field(None, ge=1, le=10_000_000, description="Stop after so many optimizer steps.")
    num_train_epochs: float = Field(3.0, gt=0, le=1000, description="Passes over the data, unless max_steps is set.")
    per_device_train_batch_size: int = Field(8, ge=1, le=4096)
    per_device_eval_batch_size: int = Field(8, ge=1, le=4096)
    gradient_accumulation_steps: int = Field(1, ge=1, le=4096)
    learning_rate: float | None = Field(
        None, gt=0, le=10, description="Peak rate; default 2e-4 for LoRA and QLoRA, 2e-5 for full."
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        "linear"
    )
    warmup_steps: float = Field(0.0, ge=0, le=1_000_000, description="Steps, or below 1 a share of all steps.")
    weight_decay: float = Field(0.0, ge=0, le=10)
    max_grad_norm: float = Field(1.0, ge=0, le=1000)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0, le=1)
    max_length: int = Field(
        1024, ge=8, le=1_048_576, description="Longest row in tokens; the rest is cut, and counted."
    )
    gradient_checkpointing: bool = Field(False, description="Less memory, about a third more time.")
    logging_steps: int = Field(1, ge=1, le=1_000_000)
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    eval_steps: int | None = Field(None, ge=1, le=10_000_000)
    save_steps: int = Field(500, ge=1, le=10_000_000, description="A checkpoint every so many steps.")
    save_total_limit: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Checkpoints that stay. Default 2 for a full fine-tune; the adapters of PEFT runs all stay.",
    )
    checkpoint_seconds: float = Field(
        300.0, gt=0, le=86_400, description="A checkpoint at least so often, unless writing takes over 2 % of the time."
    )
    seed: int = Field(42, ge=0, le=2_147_483_647)

    aliases: ClassVar[dict[str, str]] = {
        "evaluation_strategy": "eval_strategy",
        "warmup_ratio": "warmup_steps",
        "max_seq_length": "max_length",
    }
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"output_dir", "overwrite_output_dir", "logging_dir", "save_safetensors", "run_name", "group_by_length"}
    )
    refused: ClassVar[dict[str, str]] = {
        "push_to_hub": "submit a job of type push_to_hub afterwards",
        "hub_model_id": "submit a job of type push_to_hub afterwards",
        "hub_token": "submit a job of type push_to_hub afterwards; tokens never stand in a spec",
        "hub_strategy": "submit a job of type push_to_hub afterwards",
        "hub_private_repo": "submit a job of type push_to_hub afterwards",
        "resume_from_checkpoint": "an interrupted job resumes by itself",
        "deepspeed": "leave it out; the service decides how a job is spread",
        "fsdp_config": "leave it out; the service decides how a job is spread",
    }

    @model_validator(mode="after")
    def _eval_every(self) -> Self:
        if self.eval_strategy == "steps" and self.eval_steps is None:
            raise conflict("eval_steps", "eval_strategy 'steps' needs eval_steps", "Add eval_steps, e.g. 50.")
        return self


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
    learning_rates: ClassVar[tuple[float, float]] = (2e-4, 2e-5)
    """Defaults with an adapter, and in full."""

    @model_validator(mode="after")
    def _fill_learning_rate(self) -> Self:
        if self.training.learning_rate is None:
            adapter, full = self.learning_rates
            self.training.learning_rate = full if self.model.method == "full" else adapter
        return self

    @model_validator(mode="after")
    def _check_then(self) -> Self:
        order = ["merge", "validate", "deploy"]
        if [step for step in order if step in self.then] != self.then:
            raise conflict(
                "then", "then has its steps out of order", "Write merge, validate, deploy, each at most once."
            )
        if "merge" in self.then and not self.model.use_peft:
            raise conflict("then", "a full fine-tune leaves no adapter to merge", "Remove merge from then.")
        if "deploy" in self.then and self.model.use_peft and "merge" not in self.then:
            raise conflict("then", "an adapter is merged before it is served", "Write then: [merge, deploy].")
        return self

    def default_name(self) -> str:
        """``sft_qwen2.5-7b_lora_r16_alpha32``: algorithm, model, method, rank."""
        model = self.model.model_name_or_path.rstrip("/").split("/")[-1].split(":")[-1].lower()
        parts = [self.algorithm, model.removesuffix("-instruct"), self.model.method]
        if self.model.peft_config:
            parts += [f"r{self.model.peft_config.r}", f"alpha{self.model.peft_config.lora_alpha}"]
        return "_".join(parts)


class DeploymentOptions(Spec):
    """What may be said about the engine: a typed list, never a command line."""

    engine: str = Field("vllm", pattern=r"^[a-z][a-z0-9_]{0,31}$", description="Which engine file serves the model.")
    max_model_len: int | None = Field(None, ge=16, le=1_048_576, description="Longest prompt plus answer in tokens.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field("auto", description="auto = by hardware.")
    gpu_memory_utilization: float = Field(0.9, gt=0.05, le=0.98, description="Share of a GPU that the engine may take.")
    tensor_parallel_size: int = Field(1, ge=1, le=1, description="GPUs that share one replica.")
    replicas: int = Field(1, ge=1, le=1, description="Copies of the engine.")
    start_timeout: int = Field(600, ge=10, le=7200, description="Seconds until a start counts as failed.")


class DeploySpec(JobSpec, DeploymentOptions):
    """Serve a model: the job succeeds when the deployment answers for the first time."""

    type: Literal["deploy"] = "deploy"
    model: ModelRef
    name: Name = Field(description="The model name that clients ask for.")


class ServeSpec(JobSpec, DeploymentOptions):
    """One replica of a deployment: internal, made by the service, hidden from lists."""

    type: Literal["serve"] = "serve"
    model: ModelRef
    name: Name
    deployment_id: str
