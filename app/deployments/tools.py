"""Whether the engine of a deployment can read calls of tools."""

from pathlib import Path

from app import parsers
from app.artifacts import inspect, references
from app.db import Database
from app.errors import AppError
from app.models import Deployment
from app.settings import Settings

_MOST = 1024


class ToolTable:
    """Remembers what it found: a deployment's model never changes. Thread-safe."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._known: dict[str, bool] = {}

    def reads_tools(self, deployment_id: str) -> bool:
        """False only for vLLM with a chat template of no known family; another engine decides for itself."""
        known = self._known.get(deployment_id)
        if known is None:
            known = self._look(deployment_id)
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[deployment_id] = known
        return known

    def _look(self, deployment_id: str) -> bool:
        with self._database.read() as session:
            row = session.get(Deployment, deployment_id)
            if row is None or row.options.get("engine", "vllm") not in ("vllm", "auto"):
                return True
            try:
                folder = references.resolve(session, self._settings, row.project_id, row.model, param="model").folder
            except AppError:  # its files are gone; the engine that has loaded them goes on
                return True
        return folder is None or _reads(folder)


def _reads(folder: Path) -> bool:
    return parsers.for_template(inspect.template_of(folder)).tool is not None
