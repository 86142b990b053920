"""What the parts of a job spec are made of: strict types, references to what they need, rules across fields."""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN, description="Letters, digits, dot, dash, underscore; at most 63.")]


class RefTo:
    """Marks a string field that points to a model, an adapter or a file, so that the service can resolve it."""

    def __init__(self, kind: Literal["model", "adapter", "reward", "file"]) -> None:
        self.kind = kind


MODEL_GRAMMAR = "artifact:<id>, job:<id>, hub:<repo>[@rev], a path, a registered name[:vN|@alias], or a hub id"
ModelRef = Annotated[str, RefTo("model"), Field(min_length=1, max_length=512, description=f"A model: {MODEL_GRAMMAR}.")]
AdapterRef = Annotated[
    str, RefTo("adapter"), Field(min_length=1, max_length=512, description=f"An adapter: {MODEL_GRAMMAR}.")
]
RewardRef = Annotated[
    str, RefTo("reward"), Field(min_length=1, max_length=512, description=f"A reward model: {MODEL_GRAMMAR}.")
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
