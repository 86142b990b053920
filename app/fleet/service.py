"""What can be asked of workers: which there are, and what they are doing."""

from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from app.fleet import repository
from app.fleet.schemas import SlotOut, WorkerOut, WorkerStatus
from app.models import Slot, Worker, now
from app.paging import Page, page_of
from app.settings import Settings

SHOWN = timedelta(hours=1)
_FACTS = ("cpus", "memory_gb", "gpus")


def listing(session: Session, settings: Settings, project_id: str, limit: int) -> Page[WorkerOut]:
    """Living workers, and those that stopped or fell silent within the last hour; the newest first."""
    at = now()
    rows = list(repository.workers(session, at - SHOWN, limit + 1))
    slots = repository.slots_of(session, [row.id for row in rows])
    silent_since = at - timedelta(seconds=settings.lease_seconds)
    shown = [_shown(row, _status(row, silent_since), slots.get(row.id, []), project_id) for row in rows]
    return page_of(shown, limit, [row.id for row in rows])


def _status(row: Worker, silent_since: datetime) -> WorkerStatus:
    if row.stopped_at is not None:
        return "stopped"
    return "alive" if row.seen_at > silent_since else "silent"


def _shown(row: Worker, status: WorkerStatus, slots: list[tuple[Slot, str | None]], project_id: str) -> WorkerOut:
    return WorkerOut(
        id=row.id,
        host=row.host,
        pid=row.pid,
        status=status,
        started_at=row.started_at,
        seen_at=row.seen_at,
        facts={name: row.facts[name] for name in _FACTS if name in row.facts},
        slots=[
            SlotOut(
                slot_id=slot.slot_id,
                slot_class=slot.slot_class,
                gpu=slot.facts.get("gpu"),
                vram_gb=slot.facts.get("vram_gb"),
                name=slot.facts.get("name"),
                reserved=bool(slot.facts.get("reserved")),
                busy=slot.job_id is not None,
                job_id=slot.job_id if owner == project_id else None,
            )
            for slot, owner in slots
        ],
    )
