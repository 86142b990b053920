"""What every merge method is asked: shared by the merge operation and the files in ``workers/merges``."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from app.specs import AdapterRef, Dtype, JobSpec, ModelRef, Name, conflict

Weight = Annotated[float, Field(ge=-10, le=10)]
_SEVERAL = ("weights", "density", "majority_sign_method", "svd_rank", "t")


class MergeSpec(JobSpec):
    """Fold an adapter into its base, or several adapters or models into one."""

    type: Literal["merge"] = "merge"
    adapter: AdapterRef | None = Field(None, description="The adapter that is merged; or name several as `adapters`.")
    adapters: list[AdapterRef] | None = Field(
        None,
        min_length=2,
        max_length=16,
        description="Adapters of one base that are combined into one by `method` and merged into it.",
    )
    models: list[ModelRef] | None = Field(
        None, min_length=2, max_length=16, description="Whole models of one architecture that become one by `method`."
    )
    base_model: ModelRef | None = Field(
        None,
        description="Default: the base that the adapter was trained on. For `models`: what they were all trained from.",
    )
    method: str = Field(
        "lora",
        pattern=r"^[a-z][a-z0-9_]{0,31}$",
        description="Which merge method does it; GET /capabilities lists them.",
    )
    weights: list[Weight] | None = Field(
        None, min_length=2, max_length=16, description="One for each of `adapters` or `models`; default: all the same."
    )
    density: float | None = Field(
        None, gt=0, le=1, description="Share of values that ties, dare_… and magnitude_prune keep; default 0.5."
    )
    majority_sign_method: Literal["total", "frequency"] | None = Field(
        None, description="How ties and dare_ties vote on a sign: by the sum of values (default), or by their number."
    )
    svd_rank: int | None = Field(None, ge=1, le=512, description="Rank that svd leaves; default: the largest given.")
    t: float | None = Field(
        None, ge=0, le=1, description="For slerp: how far from the first model to the second; default 0.5."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="For dare_…, which drop values at random.")
    torch_dtype: Dtype | None = Field(None, description="Of the merged weights; default: as the base is stored.")
    output_name: Name | None = Field(None, description="Name of the merged model; default: the experiment name.")
    nf4_round_trip: bool = Field(
        False, description="Round the base's linear layers to 4 bit first, as they were while QLoRA trained."
    )
    proof_prompts: int = Field(
        8, ge=0, le=8, description="Prompts whose logits are compared before the job succeeds; 0 = none."
    )
    max_shard_size: int = Field(
        5_000_000_000,
        ge=1_000_000,
        description="Bytes of weights in one file of the merged model, at most; a tensor alone may be larger.",
    )
    allow_base_mismatch: bool = Field(
        False, description="Accept a base with other weights of the same shapes than the adapter was trained on."
    )

    @property
    def several(self) -> list[str]:
        """What is combined; empty for one adapter."""
        return self.adapters or self.models or []

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in ("adapter", "adapters", "models") if getattr(self, name) is not None]
        if not given:
            raise conflict("adapter", "there is nothing to merge", "Name an adapter, or several as adapters or models.")
        if len(given) > 1:
            raise conflict(given[1], f"{' and '.join(given)} exclude each other", f"Leave out {given[0]}.")
        if self.adapter is not None:
            extra = next((name for name in _SEVERAL if getattr(self, name) is not None), None)
            if extra:
                raise conflict(extra, f"{extra} is for several adapters or models", "Leave it out, or name adapters.")
        elif self.weights is not None and len(self.weights) != len(self.several):
            raise conflict(
                "weights",
                f"there are {len(self.weights)} weights for {len(self.several)} {given[0]}",
                "Give one for each, in their order.",
            )
        if self.weights is not None and not any(self.weights):
            raise conflict("weights", "all weights are zero: nothing would change", "Give at least one other weight.")
        if self.models is not None and self.nf4_round_trip:
            raise conflict("nf4_round_trip", "nf4_round_trip is for adapters", "Leave it out.")
        return self
