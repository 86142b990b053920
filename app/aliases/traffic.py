"""Which engines answer for an alias, and who of those that ask goes to which."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app.aliases import repository, targets
from app.db import Database
from app.deployments import repository as deployments
from app.deployments.service import Route
from app.errors import Code, NotFound, Unavailable
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
            sides = (alias.artifact_id, alias.canary_artifact_id, _before(session, alias))
            main, canary, earlier = [targets.serving(session, project_id, artifact_id) for artifact_id in sides]
            percent = alias.canary_percent or 0
        if not (main or canary or earlier):
            return None
        finder = targets.Finder(self._deployed, project_id)
        # Both sides have senders, so both are woken; whichever is there first answers for the other.
        first = finder.first(main)
        coming = bool(finder.waking)
        second = finder.first(canary)
        if first is None:
            # Until what it was moved to is up, what it pointed to before goes on answering. That sleeps on where the
            # other is on its way.
            first = finder.ready(earlier) if coming else finder.first(earlier)
        if first or second:
            return Split(name, first, second, percent)
        if finder.waking:  # worth waiting for
            raise finder.waking[0]
        raise Unavailable(
            f"what the alias {name} points to is not ready",
            retry_after=5,
            code=Code.MODEL_NOT_READY,
            hint="Try again soon; GET /deployments shows how far it is.",
        )


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
        names = [
            name
            for artifact_id in (alias.artifact_id, alias.canary_artifact_id, _before(session, alias))
            if artifact_id
            for name in deployments.serving(session, project_id, artifact_id)
        ]
        if names and alias.name not in by_name:
            entry = by_name[names[0]]
            changes = {"id": alias.name, "created": int(alias.created_at.timestamp()), "root": names[0]}
            found.append({**entry, **changes})
    return found
