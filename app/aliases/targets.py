"""What serves an alias's artifacts: which of it answers now, and which has to be woken for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from app.deployments import loaded
from app.deployments import repository as deployments
from app.deployments.service import Route
from app.errors import AppError, Code
from app.states import AdapterState, DeploymentState

_ANSWERS = (DeploymentState.READY, DeploymentState.UNHEALTHY)


@dataclass(frozen=True)
class Candidate:
    """A model name under which an artifact is served or about to be."""

    name: str
    answers: bool
    """By its row: to ask for the way there would wake it, and would count as a use."""


def serving(session: Session, project_id: str, artifact_id: str | None) -> Sequence[Candidate]:
    """Those of one artifact, the ones that answer first."""
    names = deployments.serving(session, project_id, artifact_id) if artifact_id else ()
    found = [Candidate(name, _answers(session, project_id, name)) for name in names]
    return sorted(found, key=lambda target: not target.answers)


def _answers(session: Session, project_id: str, name: str) -> bool:
    row = deployments.live_by_name(session, project_id, name)
    if row is not None:
        return row.status in _ANSWERS
    found = loaded.by_name(session, project_id, name)
    return found is not None and found[0].status == AdapterState.READY and found[1].status in _ANSWERS


@dataclass
class Finder:
    """Asks for ways, one target after the other, and keeps who said that he is being woken."""

    deployed: Callable[[str, str], Route]
    project_id: str
    waking: list[AppError] = field(default_factory=list)

    def first(self, targets: Sequence[Candidate]) -> Route | None:
        """The way to the first that answers; where none does, one of them is woken."""
        for target in targets:
            found = self._way(target)
            if isinstance(found, Route):
                return found
            if found is not None:
                self.waking.append(found)
                break
        return None

    def ready(self, targets: Sequence[Candidate]) -> Route | None:
        """The way to the first that answers; nobody is woken."""
        return self.first([target for target in targets if target.answers])

    def _way(self, target: Candidate) -> Route | AppError | None:
        """The error of one that is being woken; None for one that cannot be had."""
        try:
            return self.deployed(target.name, self.project_id)
        except AppError as error:
            return error if error.code is Code.MODEL_WAKING else None
