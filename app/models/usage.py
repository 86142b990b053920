"""Rows of what keys have used."""

from datetime import date

from sqlalchemy import BigInteger, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base


class Usage(Base):
    """Sums over the requests of one key to one model on one day (UTC)."""

    __tablename__ = "usage"
    __table_args__ = (Index("ix_usage_project_day", "project_id", "day"),)
    # No foreign key: what was used stays known when its key goes.
    key_id: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"))
    requests: Mapped[int] = mapped_column(BigInteger, default=0)
    errors: Mapped[int] = mapped_column(BigInteger, default=0)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    completion_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    latency_ms: Mapped[int] = mapped_column(BigInteger, default=0)
    """Whole answers, summed."""
    first_byte_ms: Mapped[int] = mapped_column(BigInteger, default=0)
    """Until the engine's first byte, summed."""
