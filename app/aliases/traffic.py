"""Which engines answer for an alias, and who of those that ask goes to which."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app.aliases import repository
from app.db import Database
from app.deployments import repository as deployments
from app.deployments.service import Route
from app.errors import AppError, Code, NotFound, Unavailable
from app.models import Alias


@dataclass(frozen=True)
class Split:
    """An alias's targets that can answer now. ``canary``, if there is one, gets ``percent`` of the senders."""

    alias: str
    main: Route | None
    canary: Route | None = None
    percent: float = 0

    def routes_for(self, sender: str) -> Sequence[Route]:
        """The target of a sender, and after it the other. The same sender always has the same one.

        Who is on the canary's side at 10 % is there at 20 % too.
        """
        place = int.from_bytes(hashlib.sha256(f"{self.alias}\0{sender}".encode()).digest()[:8]) / 2**64
        order = (self.canary, self.main) if place * 100 < self.percent else (self.main, self.canary)
        return [route for route in order if route is not None]


class Traffic:
    """Finds where a model's name leads: to a deployment of this name, or through an alias to those of its artifacts."""

    def __init__(self, database: Database, deployed: Callable[[str, str], Route]) -> None:
        self._database = database
        self._deployed = deployed

    def find(self, model: str, project_id: str) -> Route | Split:
        """Raises what ``deployed`` raises, and Unavailable for an alias that nothing serves."""
        try:
            return self._deployed(model, project_id)
        except NotFound:
            split = self._split(model, project_id)
            if split is None:
                raise
            return split

    def _split(self, name: str, project_id: str) -> Split | None:
        with self._database.read() as session:
            alias = repository.get(session, project_id, name)
            if alias is None:
                return None
            main = deployments.serving(session, project_id, alias.artifact_id)
            canary = deployments.serving(session, project_id, alias.canary_artifact_id or "")
            earlier = deployments.serving(session, project_id, _before(session, alias) or "")
        if not (main or canary or earlier):
            return None
        waking: list[AppError] = []
        routes = [self._first_ready(names, project_id, waking) for names in (main, canary, earlier)]
        if not any(routes):
            if waking:  # worth waiting for
                raise waking[0]
            raise Unavailable(
                f"what the alias {name} points to is not ready",
                retry_after=5,
                code=Code.MODEL_NOT_READY,
                hint="Try again soon; GET /deployments shows how far it is.",
            )
        # Until what it was moved to is up, what it pointed to before goes on answering.
        return Split(name, routes[0] or routes[2], routes[1], alias.canary_percent or 0)

    def _first_ready(self, names: Sequence[str], project_id: str, waking: list[AppError]) -> Route | None:
        for name in names:
            try:
                return self._deployed(name, project_id)
            except AppError as error:
                if error.code is Code.MODEL_WAKING:
                    waking.append(error)
        return None


def _before(session: Session, alias: Alias) -> str | None:
    """Where an alias pointed before it was moved on; None after a way back, which means: not there any more."""
    for move in repository.moves(session, alias.project_id, alias.name):
        if move.goes_back:
            return None
        if move.artifact_id != alias.artifact_id:
            return move.artifact_id
    return None


def aliased_models(session: Session, project_id: str, served: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Aliases that lead to something served, as ``/v1/models`` lists them. A deployment of the same name hides one."""
    by_name = {entry["id"]: entry for entry in served}
    found = []
    for alias in repository.every(session, project_id):
        targets = [
            name
            for artifact_id in (alias.artifact_id, alias.canary_artifact_id, _before(session, alias))
            if artifact_id
            for name in deployments.serving(session, project_id, artifact_id)
        ]
        if targets and alias.name not in by_name:
            entry = by_name[targets[0]]
            changes = {"id": alias.name, "created": int(alias.created_at.timestamp()), "root": targets[0]}
            found.append({**entry, **changes})
    return found
