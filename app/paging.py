"""Lists: ``{object, data, has_more, first_id, last_id}``, newest first, with a cursor."""

from collections.abc import Sequence
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, Field

T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    """One page of a list."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool = Field(description="True when a further page follows; ask for it with after=last_id.")
    first_id: str | None
    last_id: str | None


class Deleted(BaseModel):
    """Answer to a DELETE."""

    id: str
    object: str = Field(examples=["deployment"])
    deleted: bool = True


def page_of(rows: Sequence[T], limit: int, ids: Sequence[str]) -> Page[T]:
    """A page from up to ``limit + 1`` rows and their ids."""
    kept = ids[:limit]
    return Page(
        data=list(rows[:limit]),
        has_more=len(rows) > limit,
        first_id=kept[0] if kept else None,
        last_id=kept[-1] if kept else None,
    )
