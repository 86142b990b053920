"""How a model is spoken to: which chat template a request must bring along, and whether calls of tools can be read.

Read once and remembered: neither an adapter nor the model of one generation of a deployment ever changes.
"""

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from app import parsers
from app.artifacts import inspect, references
from app.db import Database
from app.deployments import words
from app.deployments.routes import Route
from app.errors import AppError
from app.models import Deployment
from app.settings import Settings

_MOST = 1024


@dataclass(frozen=True)
class Manner:
    """How one model is spoken to."""

    reads_tools: bool = True
    """False for vLLM without a parser that fits the model's chat template, and for ``transformers``, which has none.

    Another engine decides for itself; so does what ``auto`` made of it.
    """
    template: str | None = None
    """The chat template that a request has to bring along; None: the engine's own is the right one."""


class Manners:
    """By deployment with its generation, and by adapter on it. Thread-safe."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._known: dict[tuple[str, int, str | None], Manner] = {}

    def remembered(self, route: Route) -> Manner | None:
        """Without the database or a disk; None: it has to be looked up."""
        return self._known.get((route.deployment_id, route.generation, route.adapter))

    def look_up(self, route: Route) -> Manner:
        """Reads rows and files."""
        manner = self._look(route)
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[route.deployment_id, route.generation, route.adapter] = manner
        return manner

    def _look(self, route: Route) -> Manner:
        with self._database.read() as session:
            row = session.get(Deployment, route.deployment_id)
            if row is None:
                return Manner()
            base = self._folder(session, row, row.model)
            adapter = self._folder(session, row, route.adapter) if route.adapter is not None else None
        own = words.own_template(adapter, base) if adapter is not None and base is not None else None
        engine = row.options.get("engine", "vllm")
        if engine not in ("vllm", "auto") or base is None:
            return Manner(reads_tools=engine != "transformers", template=own)
        # What the engine was started with: it reads no other family's calls.
        parser = parsers.chosen(inspect.template_of(base), row.options.get("tool_call_parser", "auto")).tool
        fits = own is None or parsers.for_template(own).tool == parser
        return Manner(reads_tools=parser is not None and fits, template=own)

    def _folder(self, session: Session, row: Deployment, reference: str) -> Path | None:
        """None where its files are gone: the engine that has loaded them goes on."""
        try:
            return references.resolve(session, self._settings, row.project_id, reference, param="model").folder
        except AppError:
            return None
