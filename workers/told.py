"""What a child told, on its way into rows. Nothing of it is trusted."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Insert
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.models import Metric

_METRIC_ROWS = 1000
_HEALTH = ("ok", "warning", "failed")


def is_step(value: object) -> bool:
    """A number that fits the column; what a child writes is not trusted."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def patched(spec: dict[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the resolved spec with one value replaced."""
    *parents, last = str(line.get("path", "")).split(".")
    copy = dict(spec)
    place = copy
    for step in parents:
        inner = place.get(step)
        if not isinstance(inner, dict):
            return spec  # the spec has no such place, and must stay one that can be read again
        place[step] = dict(inner)
        place = place[step]
    place[last] = line.get("value")
    return copy


def diagnosed(health: dict[str, Any] | None, line: Mapping[str, Any]) -> dict[str, Any]:
    """The job's health with one more check; its status is the worst of them."""
    facts = line["facts"] if isinstance(line.get("facts"), dict) else {}
    status = line["status"] if line.get("status") in _HEALTH else "warning"
    message = str(line["message"])[:1000] if line.get("message") else None
    check = {**facts, "status": status, "message": message}
    checks = {**((health or {}).get("checks") or {}), str(line.get("check"))[:64]: check}
    worst = max((entry["status"] for entry in checks.values()), key=_HEALTH.index)
    return {"status": worst, "checks": checks}


def upsert_metrics(session: Session, rows: list[dict[str, Any]]) -> None:
    """Stores metrics; of a step that was told twice the later values."""
    unique = list({(row["step"], row["name"]): row for row in rows}.values())
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    for start in range(0, len(unique), _METRIC_ROWS):  # a statement holds a limited number of values
        statement: Any = insert(Metric).values(unique[start : start + _METRIC_ROWS])
        upsert: Insert = statement.on_conflict_do_update(
            index_elements=["job_id", "step", "name"], set_={"value": statement.excluded.value}
        )
        session.execute(upsert)
