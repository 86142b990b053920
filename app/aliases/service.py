"""What can be done with aliases: point them, look at where they pointed, go back."""

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.aliases import repository
from app.aliases.schemas import AliasOut, AliasPut, MoveOut
from app.artifacts import references
from app.artifacts import repository as artifacts
from app.errors import BadRequest, Code, Conflict, NotFound
from app.models import Alias, AliasMove, Artifact, now
from app.projects.caller import Caller
from app.settings import Settings


def listing(session: Session, project_id: str) -> list[AliasOut]:
    """All of the project, by name."""
    rows = repository.every(session, project_id)
    targets = artifacts.by_ids(session, [row.artifact_id for row in rows])
    return [_shown(row, targets[row.artifact_id]) for row in rows]


def show(session: Session, project_id: str, name: str) -> AliasOut:
    """One, with its history. Raises NotFound."""
    row = _existing(session, project_id, name)
    target = artifacts.by_ids(session, [row.artifact_id])[row.artifact_id]
    history = [MoveOut.of(move) for move in repository.moves(session, project_id, name)]
    return _shown(row, target, history)


def put(session: Session, settings: Settings, caller: Caller, name: str, body: AliasPut) -> AliasOut:
    """Points an alias to an artifact, and makes it if it is new. Raises NotFound, BadRequest, Conflict."""
    found = references.resolve(session, settings, caller.project_id, body.artifact, param="artifact")
    if found.artifact is None:
        raise BadRequest(
            f"artifact: {body.artifact} is no artifact of this service",
            param="artifact",
            code=Code.MODEL_NOT_FOUND,
            hint="GET /artifacts lists what an alias can point to; import a model first.",
        )
    if artifacts.by_name(session, caller.project_id, name, None) is not None:
        raise Conflict(
            f"artifacts are called {name}; an alias of that name would hide them",
            param="name",
            code=Code.NAME_TAKEN,
            hint=f"Choose another name, e.g. {name}-prod.",
        )
    row = repository.get(session, caller.project_id, name)
    if body.expected is not None and (row is None or row.artifact_id != body.expected):
        at = f"points to {row.artifact_id}" if row else "does not exist"
        raise Conflict(
            f"the alias {name} {at}, not to {body.expected}",
            param="expected",
            hint=f"Look at GET /aliases/{name} and decide again.",
        )
    if row is None or row.artifact_id != found.artifact.id:
        _move(session, caller, name, row, found.artifact, body.note)
    return show(session, caller.project_id, name)


def roll_back(session: Session, caller: Caller, name: str, note: str | None) -> AliasOut:
    """Points an alias to where it pointed before its last move. Raises NotFound, and Conflict if there is nothing.

    Going back twice goes on to what was before that, not forth again.
    """
    row = _existing(session, caller.project_id, name)
    for artifact_id in _earlier(session, caller.project_id, name):
        before = artifacts.get(session, caller.project_id, artifact_id)
        if before is not None and before.id != row.artifact_id:  # None: deleted since
            _move(session, caller, name, row, before, note, goes_back=True)
            return show(session, caller.project_id, name)
    raise Conflict(
        f"the alias {name} has pointed to nothing else that still exists",
        param="name",
        code=Code.WRONG_STATE,
        hint=f"PUT /aliases/{name} points it to an artifact of your choice.",
    )


def _earlier(session: Session, project_id: str, name: str) -> list[str]:
    """Artifacts that can be gone back to, the nearest first."""
    stack: list[str] = []
    for move in reversed(repository.moves(session, project_id, name)):
        if move.artifact_id is None:
            stack.clear()
        elif move.goes_back:
            while stack and stack[-1] != move.artifact_id:
                stack.pop()
        else:
            stack.append(move.artifact_id)
    return stack[-2::-1]


def remove(session: Session, caller: Caller, name: str) -> None:
    """Takes an alias away; its history stays. Raises NotFound."""
    _move(session, caller, name, _existing(session, caller.project_id, name), None, None)


def _move(
    session: Session,
    caller: Caller,
    name: str,
    row: Alias | None,
    to: Artifact | None,
    note: str | None,
    *,
    goes_back: bool = False,
) -> None:
    last = next(iter(repository.moves(session, caller.project_id, name)), None)
    move = AliasMove(
        project_id=caller.project_id,
        name=name,
        seq=last.seq + 1 if last else 1,
        artifact_id=to.id if to else None,
        version=f"{to.name}:v{to.version}" if to else None,
        goes_back=goes_back,
        created_at=now(),
        created_by=caller.key_id,
        note=note,
    )
    try:
        with session.begin_nested():
            repository.point(session, row, move)
    except IntegrityError as error:
        raise Conflict(
            f"the alias {name} was moved at the same moment", param="name", hint=f"Look at GET /aliases/{name} first."
        ) from error


def _existing(session: Session, project_id: str, name: str) -> Alias:
    row = repository.get(session, project_id, name)
    if row is None:
        raise NotFound(f"there is no alias {name}", param="name", hint=f"PUT /aliases/{name} makes it.")
    return row


def _shown(row: Alias, target: Artifact, history: list[MoveOut] | None = None) -> AliasOut:
    return AliasOut(
        name=row.name,
        artifact_id=row.artifact_id,
        version=f"{target.name}:v{target.version}",
        moved_at=row.moved_at,
        history=history or [],
    )
