"""API keys as the API shows and takes them."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from app.models import ApiKey, now
from app.specs import Spec

Limit = Annotated[int, Field(ge=0, le=2**31 - 1)]
Scope = Literal["read", "submit", "serve", "admin"]


def _read(value: Any) -> Any:
    """JSON has no moments, and strict types take no text for one."""
    return datetime.fromisoformat(value) if isinstance(value, str) else value


def _coming(value: datetime) -> datetime:
    if value <= now():
        raise ValueError("it lies in the past")
    return value.astimezone(UTC)


Moment = Annotated[AwareDatetime, BeforeValidator(_read), AfterValidator(_coming)]


class LimitsIn(Spec):
    """What a key may ask of models. Null: as the service's settings have it; 0: without a limit."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"requests_per_minute": 60, "tokens_per_minute": 100_000}]}
    )
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = Field(None, description="Read and written.")
    concurrent_requests: Limit | None = Field(None, description="Open at once, in each API process.")


class KeyIn(LimitsIn):
    """A key to be made."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "support bot", "scopes": ["serve"], "requests_per_minute": 60}]}
    )
    name: str = Field(min_length=1, max_length=200)
    scopes: list[Scope] = Field(["read", "submit", "serve"], min_length=1, max_length=4)
    expires_at: Moment | None = Field(
        None, description="With an offset: 2027-01-31T12:00:00Z. From then on nothing takes the key; null = never."
    )


class KeyOut(BaseModel):
    """A key, without its secret."""

    id: str = Field(description="The middle part of `ts_<id>_<secret>`.")
    object: Literal["key"] = "key"
    name: str
    scopes: list[str]
    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrent_requests: int | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    @classmethod
    def of(cls, row: ApiKey) -> "KeyOut":
        """From its row."""
        return cls.model_validate(row, from_attributes=True)


class NewKey(KeyOut):
    """A key that was made just now."""

    key: str = Field(description="The only time that it can be seen.")
    object: Literal["key"] = "key"


class KeyList(BaseModel):
    """The keys of a project."""

    object: Literal["list"] = "list"
    data: list[KeyOut]
