"""Tells a run where the engines listen that it asks: a file in its folder, kept true while the run goes on.

The run has neither the database nor a key. It says in its journal which of its models it asks now; that one is kept
awake, and its way is looked up again every second, because an engine that starts anew has another socket.
"""

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from app.db import Database
from app.deployments.routes import Route, Router
from app.deployments.whose import names_for
from app.errors import AppError, Unavailable
from app.jobs.asking import FIELDS
from app.models import Job
from app.settings import Settings
from app.storage import write_private
from workers.context import SERVED
from workers.ledger import Line

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0


class Lookout(threading.Thread):
    """From the start of an attempt to its end; ``inputs`` say which model is which."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        ring: Callable[[], None],
        job: Job,
        folder: Path,
        inputs: Mapping[str, Mapping[str, Any]],
    ) -> None:
        super().__init__(name=f"lookout-{job.id}", daemon=True)
        self._database = database
        self._router = Router(database, ring, settings)
        self._project_id = job.project_id
        self._names = {field: job.resolved_spec.get(name) for field, name in FIELDS.items()}
        base = inputs.get("baseline") or inputs.get("model.base") or {}
        self._pinned = {"model": str(inputs["model"]["pinned"]), "baseline": str(base.get("pinned"))}
        self._file = folder / SERVED
        self._written: dict[str, Any] = {}
        self._field: str | None = None
        self._bell = threading.Event()
        self._over = threading.Event()

    def hear(self, lines: Sequence[Line]) -> None:
        """What the run tells; of interest is which model it asks now."""
        for line in lines:
            if line["kind"] == "asks" and line.get("field") in FIELDS:
                self._field = str(line["field"])
                self._bell.set()

    def run(self) -> None:
        """Until ``stop``."""
        while not self._over.is_set():
            self._bell.clear()
            if self._field is not None:
                try:
                    self._tell({self._field: self._look(self._field)})
                except (SQLAlchemyError, OSError) as error:
                    log.warning("%s: %r; tried again", self.name, error)
                except Exception:
                    log.exception("%s: a look failed", self.name)
            self._bell.wait(POLL_SECONDS)

    def stop(self) -> None:
        """No further look."""
        self._over.set()
        self._bell.set()

    def _tell(self, found: dict[str, Any]) -> None:
        if found != self._written:
            write_private(self._file, json.dumps(found).encode())
            self._written = found

    def _look(self, field: str) -> dict[str, Any]:
        """The way, or why there is none now, or (``code``) why there will be none."""
        try:
            route = self._route(field)
            return {"sockets": [target.socket for target in route.targets], "name": route.served_name}
        except Unavailable as error:
            return {"reason": error.message}
        except AppError as error:
            return {"code": str(error.code), "reason": error.message, "hint": error.hint, "param": FIELDS[field]}

    def _route(self, field: str) -> Route:
        waiting: list[Unavailable] = []
        for name in self._served_as(field):
            try:
                route = self._router.route_for(name, self._project_id)
            except Unavailable as error:
                waiting.append(error)
                continue
            # Between the two looks the deployment may have been given another model.
            if name in self._served_as(field):
                return route
        raise waiting[0] if waiting else Unavailable("the deployment is being changed")

    def _served_as(self, field: str) -> Sequence[str]:
        with self._database.read() as session:
            return names_for(
                session,
                self._project_id,
                self._pinned[field],
                self._names[field],
                param=FIELDS[field],
                beside=self._names["model"],
            )
