"""Uploaded files as the API shows them."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field

from app.models import File


class FileOut(BaseModel):
    """A data file."""

    id: str = Field(examples=["file-0b7c1d2e3f405162738495a6"])
    object: Literal["file"] = "file"
    filename: str
    purpose: str
    bytes: int
    sha256: str
    status: Literal["uploaded", "processed", "error"]
    format: str | None = Field(description="Shape of its rows: messages, prompt_completion, alpaca, sharegpt, …")
    rows: int | None
    created_at: datetime

    @classmethod
    def of(cls, row: File) -> "FileOut":
        """From its row."""
        return cls(
            id=row.id,
            filename=row.filename,
            purpose=row.purpose,
            bytes=row.bytes,
            sha256=row.sha256,
            status=row.status,
            format=row.format,
            rows=row.rows,
            created_at=row.created_at,
        )
