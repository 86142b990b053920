"""What can be done with aliases: point them, look at where they pointed, go back."""

from collections.abc import Mapping

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.aliases import repository
from app.aliases.schemas import AliasOut, AliasPut, CanaryOut, MoveOut
from app.artifacts import references
from app.artifacts import repository as artifacts
from app.errors import BadRequest, Code, Conflict, NotFound
from app.models import Alias, AliasMove, Artifact, now
from app.projects.caller import Caller
from app.settings import Settings


def listing(session: Session, project_id: str) -> list[AliasOut]:
    """All of the project, by name."""
    rows = repository.every(session, project_id)
    ids = [artifact_id for row in rows for artifact_id in (row.artifact_id, row.canary_artifact_id) if artifact_id]
    targets = artifacts.by_ids(session, ids)
    return [_shown(row, targets) for row in rows]


def show(session: Session, project_id: str, name: str) -> AliasOut:
    """One, with its history. Raises NotFound."""
    row = _existing(session, project_id, name)
    targets = artifacts.by_ids(session, [one for one in (row.artifact_id, row.canary_artifact_id) if one])
    history = [MoveOut.of(move) for move in repository.moves(session, project_id, name)]
    return _shown(row, targets, history)


def put(session: Session, settings: Settings, caller: Caller, name: str, body: AliasPut) -> AliasOut:
    """Points an alias to an artifact, and makes it if it is new. Raises NotFound, BadRequest, Conflict."""
    target = _artifact(session, settings, caller, body.artifact, "artifact")
    canary = None
    if body.canary is not None:
        canary = (_artifact(session, settings, caller, body.canary.artifact, "canary.artifact"), body.canary.percent)
        if canary[0].id == target.id:
            raise BadRequest(
                "canary.artifact: it is where the alias points anyway",
                param="canary.artifact",
                code=Code.CONFLICTING_FIELDS,
                hint="Name another artifact, or leave canary out.",
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
    wanted = (target.id, canary[0].id if canary else None, canary[1] if canary else None)
    if row is None or (row.artifact_id, row.canary_artifact_id, row.canary_percent) != wanted:
        _move(session, caller, name, row, target, body.note, canary=canary)
    return show(session, caller.project_id, name)


def _artifact(session: Session, settings: Settings, caller: Caller, reference: str, param: str) -> Artifact:
    found = references.resolve(session, settings, caller.project_id, reference, param=param)
    if found.artifact is None:
        raise BadRequest(
            f"{param}: {reference} is no artifact of this service",
            param=param,
            code=Code.MODEL_NOT_FOUND,
            hint="GET /artifacts lists what an alias can point to; import a model first.",
        )
    return found.artifact


def roll_back(session: Session, caller: Caller, name: str, note: str | None) -> AliasOut:
    """Ends its canary; without one, points it to where it pointed before. Raises NotFound, and Conflict if there is
    nothing.

    Going back twice goes on to what was before that, not forth again.
    """
    row = _existing(session, caller.project_id, name)
    if row.canary_artifact_id is not None:
        stays = artifacts.get(session, caller.project_id, row.artifact_id)
        _move(session, caller, name, row, stays, note, goes_back=True)
        return show(session, caller.project_id, name)
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
        elif not stack or stack[-1] != move.artifact_id:  # else only its canary changed
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
    canary: tuple[Artifact, float] | None = None,
) -> None:
    last = next(iter(repository.moves(session, caller.project_id, name)), None)
    move = AliasMove(
        project_id=caller.project_id,
        name=name,
        seq=last.seq + 1 if last else 1,
        artifact_id=to.id if to else None,
        version=_version(to) if to else None,
        canary_artifact_id=canary[0].id if canary else None,
        canary_version=_version(canary[0]) if canary else None,
        canary_percent=canary[1] if canary else None,
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


def _shown(row: Alias, targets: Mapping[str, Artifact], history: list[MoveOut] | None = None) -> AliasOut:
    canary = None
    if row.canary_artifact_id is not None:
        canary = CanaryOut(
            artifact_id=row.canary_artifact_id,
            version=_version(targets[row.canary_artifact_id]),
            percent=row.canary_percent or 0,
        )
    return AliasOut(
        name=row.name,
        artifact_id=row.artifact_id,
        version=_version(targets[row.artifact_id]),
        canary=canary,
        moved_at=row.moved_at,
        history=history or [],
    )


def _version(artifact: Artifact) -> str:
    return f"{artifact.name}:v{artifact.version}"
