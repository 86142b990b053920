"""Usage as the API shows it."""

from datetime import date
from typing import Any, Literal

from pydantic import BaseModel, Field
from sqlalchemy import Row

Group = Literal["key", "model", "day"]
COLUMNS: dict[str, str] = {"key": "key_id", "model": "model", "day": "day"}


class UsageOut(BaseModel):
    """Sums over requests; what was not grouped by is null."""

    object: Literal["usage"] = "usage"
    day: date | None = Field(description="UTC.")
    key_id: str | None = Field(description="The middle part of an API key.", examples=["9f1c0a7be2d4"])
    model: str | None = Field(description="The model that answered, also where an alias was asked for.")
    requests: int = Field(description="Requests that reached a model.")
    errors: int = Field(description="Of these, those that the model's engine refused or broke off.")
    prompt_tokens: int
    completion_tokens: int = Field(
        description="As the engine counts them; of a stream that its client left, the pieces that were sent."
    )
    mean_latency_ms: float = Field(description="From the request to the answer's last byte.")
    mean_first_byte_ms: float = Field(description="From the request to the answer's first byte.")

    @classmethod
    def of(cls, row: Row[Any]) -> "UsageOut":
        """From a row of sums."""
        found = row._mapping
        count = int(found["requests"])
        return cls(
            day=found.get("day"),
            key_id=found.get("key_id"),
            model=found.get("model"),
            requests=count,
            errors=int(found["errors"]),
            prompt_tokens=int(found["prompt_tokens"]),
            completion_tokens=int(found["completion_tokens"]),
            mean_latency_ms=round(int(found["latency_ms"]) / max(1, count), 1),
            mean_first_byte_ms=round(int(found["first_byte_ms"]) / max(1, count), 1),
        )


class UsageList(BaseModel):
    """What was used."""

    object: Literal["list"] = "list"
    data: list[UsageOut]
    has_more: bool = Field(description="There are more rows than `limit`; ask for less at a time.")
