"""Workers whose slots are asked by hand: rows without a process."""

from typing import Any

from sqlalchemy import select

from app.db import Database
from app.jobs import claims, repository
from app.jobs.placement import ON_A_GPU
from app.jobs.repository import Move
from app.models import Slot, Worker
from app.states import JobState


class Machine:
    """A worker whose slots are asked by hand."""

    def __init__(self, database: Database, name: str) -> None:
        self.database = database
        self.name = name
        with database.write() as session:
            session.add(Worker(id=name, host=name, pid=1))

    def slot(self, slot_id: str, slot_class: str = "gpu", **facts: Any) -> None:
        with self.database.write() as session:
            session.add(Slot(worker_id=self.name, slot_id=slot_id, slot_class=slot_class, facts=facts))

    def ask(self, slot_id: str) -> str | None:
        """The job that the slot's thread would get."""
        classes = ON_A_GPU if slot_id.startswith("gpu") else (slot_id.partition("-")[0],)
        with self.database.write() as session:
            job = claims.claim(session, self.name, slot_id, classes)
            return job.id if job else None

    def held(self) -> dict[str, str | None]:
        with self.database.read() as session:
            rows = session.scalars(select(Slot).where(Slot.worker_id == self.name).order_by(Slot.slot_id))
            return {slot.slot_id: slot.job_id for slot in rows}

    def end(self, job_id: str) -> None:
        with self.database.write() as session:
            assert repository.transition(
                session, job_id, JobState.RUNNING, Move(JobState.SUCCEEDED, "x", "x", values={"result": {}})
            )
