"""Rows of usage: added up, and asked for by key, model and day."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from sqlalchemy import ColumnElement, Row, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.models import Usage

SUMS = ("requests", "errors", "prompt_tokens", "completion_tokens", "latency_ms", "first_byte_ms")
GROUPS = ("key_id", "model", "day")


@dataclass(frozen=True, order=True)
class Line:
    """What is counted together."""

    key_id: str
    model: str
    day: date
    project_id: str


def add(session: Session, counts: Mapping[Line, Mapping[str, int]]) -> None:
    """Adds to what is there already, so that several processes can count the same key."""
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    # In one order in every process: two that added to the same rows in another order would wait for each other.
    for line in sorted(counts):
        statement = insert(Usage).values(
            key_id=line.key_id, model=line.model, day=line.day, project_id=line.project_id, **counts[line]
        )
        grown = {name: getattr(Usage, name) + statement.excluded[name] for name in SUMS}
        session.execute(statement.on_conflict_do_update(index_elements=GROUPS, set_=grown))


def sums(
    session: Session,
    project_id: str,
    by: Sequence[str],
    *,
    since: date,
    until: date,
    key_id: str | None,
    model: str | None,
    limit: int,
) -> Sequence[Row[Any]]:
    """Grouped by some of ``GROUPS``, the newest day first, then the most requests; ``limit + 1`` rows at most."""
    groups = [getattr(Usage, name) for name in by]
    # Postgres adds BIGINTs up to a NUMERIC.
    totals = [func.sum(getattr(Usage, name)).label(name) for name in SUMS]
    query = select(*groups, *totals).where(Usage.project_id == project_id, Usage.day.between(since, until))
    if key_id is not None:
        query = query.where(Usage.key_id == key_id)
    if model is not None:
        query = query.where(Usage.model == model)
    order: list[ColumnElement[Any]] = [Usage.day.desc()] if "day" in by else []
    order += [func.sum(Usage.requests).desc(), *(group for group in groups if group is not Usage.day)]
    return session.execute(query.group_by(*groups).order_by(*order).limit(limit + 1)).all()
