"""What can be asked about usage."""

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta

from sqlalchemy.orm import Session

from app.errors import BadRequest
from app.usage import repository
from app.usage.schemas import COLUMNS, Group, UsageList, UsageOut

DEFAULT_DAYS = 30


def show(
    session: Session,
    project_id: str,
    by: Sequence[Group],
    *,
    since: date | None,
    until: date | None,
    key_id: str | None,
    model: str | None,
    limit: int,
) -> UsageList:
    """Sums of the project, grouped by some of key, model and day. Raises BadRequest for days in the wrong order."""
    until = until or datetime.now(UTC).date()
    since = since or max(until, date.min + timedelta(DEFAULT_DAYS)) - timedelta(days=DEFAULT_DAYS - 1)
    if since > until:
        raise BadRequest("since is after until", param="since", hint="Days are written 2026-11-27, in UTC.")
    groups = [COLUMNS[name] for name in dict.fromkeys(by)]
    rows = repository.sums(
        session, project_id, groups, since=since, until=until, key_id=key_id, model=model, limit=limit
    )
    return UsageList(data=[UsageOut.of(row) for row in rows[:limit]], has_more=len(rows) > limit)
