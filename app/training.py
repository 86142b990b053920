"""How a training spec says what to learn from and how: the blocks ``dataset`` and ``training``."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from app.blocks import FileRef, Spec, conflict


class DatasetBlock(Spec):
    """Which uploaded file to learn from."""

    file: FileRef
    eval_file: FileRef | None = Field(None, description="Held-out rows; what is learnt is measured on them.")
    eval_split: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share of the rows that is held out where there is no eval_file. Default 5 %, at most 64 rows, "
        "of files from 320 rows on, and nothing of smaller ones; 0 = every row is learnt.",
    )
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "preference", "prompt", "text"] = (
        Field("auto", description="Shape of a row; auto looks at the fields.")
    )


Better = Literal["lower", "higher"]


class EarlyStopping(Spec):
    """When a run ends because it gets no better."""

    metric: str | None = Field(
        None, min_length=1, max_length=64, description="A number of the evaluations; default as metric_for_best_model."
    )
    patience: int = Field(3, ge=1, le=10_000, description="Evaluations in a row without an improvement.")
    min_delta: float = Field(0.0, ge=0, le=1e9, description="The least change that counts as an improvement.")


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
    packing: bool | Literal["auto"] = Field(
        False,
        description="Several rows in each block of max_length tokens, none of which sees another; a block counts as "
        "one row of a batch. auto = with flash attention. Without it, rows of like length share a batch.",
    )
    gradient_checkpointing: bool = Field(False, description="Less memory, about a third more time.")
    activation_offloading: bool = Field(False, description="On a GPU: activations wait in the host's memory.")
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "adafactor",
        "sgd",
    ] = Field("adamw_torch_fused", description="The 8-bit ones keep Adam's moments in bytes; paged ones need a GPU.")
    use_liger_kernel: bool | Literal["auto"] = Field(
        "auto", description="On a GPU: Liger's kernels; auto = for sft and pretrain, where they are installed."
    )
    torch_compile: bool = Field(False, description="On a GPU: the model is compiled, minutes before the first step.")
    parallelism: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="With several GPUs: ddp = the model whole on each; fsdp = in parts; auto = fsdp for full ones.",
    )
    logging_steps: int = Field(1, ge=1, le=1_000_000)
    eval_strategy: Literal["no", "steps", "epoch"] = Field(
        "no", description="When the held-out rows are measured; steps where eval_steps is given."
    )
    eval_steps: int | None = Field(None, ge=1, le=10_000_000, description="Measure every so many steps.")
    metric_for_best_model: str | None = Field(
        None, min_length=1, max_length=64, description="By which the best checkpoint is known; default eval_loss."
    )
    load_best_model_at_end: bool | None = Field(
        None, description="The result holds the weights of the best evaluation; default true with early_stopping."
    )
    early_stopping: EarlyStopping | None = Field(None, description="Ends a run whose evaluations get no better.")
    max_seconds: float | None = Field(
        None,
        gt=0,
        le=31_536_000,
        description="Time in slots over all attempts, after which the run ends well, with what it has learnt by then.",
    )
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
        "greater_is_better": "leave it out; it follows from metric_for_best_model",
    }

    @model_validator(mode="after")
    def _eval_every(self) -> Self:
        if self.eval_steps is not None and "eval_strategy" not in self.model_fields_set:
            self.eval_strategy = "steps"
        if self.eval_strategy == "steps" and self.eval_steps is None:
            raise conflict("eval_steps", "eval_strategy 'steps' needs eval_steps", "Add eval_steps, e.g. 50.")
        return self
