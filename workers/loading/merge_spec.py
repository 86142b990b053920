"""What every merge method is asked: shared by the merge operation and the files in ``workers/merges``."""

from typing import Literal

from pydantic import Field

from app.specs import AdapterRef, Dtype, JobSpec, ModelRef, Name


class MergeSpec(JobSpec):
    """Fold an adapter into its base."""

    type: Literal["merge"] = "merge"
    adapter: AdapterRef
    base_model: ModelRef | None = Field(None, description="Default: the base that the adapter was trained on.")
    method: str = Field("lora", pattern=r"^[a-z][a-z0-9_]{0,31}$", description="Which merge method does it.")
    torch_dtype: Dtype | None = Field(None, description="Of the merged weights; default: as the base is stored.")
    output_name: Name | None = Field(None, description="Name of the merged model; default: the experiment name.")
    allow_base_mismatch: bool = Field(
        False, description="Accept a base with other weights of the same shapes than the adapter was trained on."
    )
