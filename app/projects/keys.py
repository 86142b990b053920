"""What admins can do with keys: make, list, limit and revoke them."""

from sqlalchemy.orm import Session

from app.errors import NotFound
from app.models import ApiKey, now
from app.projects import repository
from app.projects.caller import Caller
from app.projects.schemas import KeyIn, KeyOut, LimitsIn, NewKey
from app.projects.service import create_key


def make(session: Session, caller: Caller, body: KeyIn) -> NewKey:
    """A key of the caller's project."""
    key = create_key(session, body.name, caller.project_id, tuple(dict.fromkeys(body.scopes)))
    session.flush()
    row = _existing(session, caller, key.split("_")[1])
    row.expires_at = body.expires_at
    _limit(row, body)
    session.flush()
    return NewKey(**KeyOut.of(row).model_dump(), key=key)


def listing(session: Session, caller: Caller) -> list[KeyOut]:
    """All of the project, the newest first; revoked ones too."""
    return [KeyOut.of(row) for row in repository.keys_of(session, caller.project_id)]


def limit(session: Session, caller: Caller, key_id: str, body: LimitsIn) -> KeyOut:
    """Changes the limits that ``body`` names. Raises NotFound."""
    row = _existing(session, caller, key_id)
    _limit(row, body)
    session.flush()
    return KeyOut.of(row)


def revoke(session: Session, caller: Caller, key_id: str) -> None:
    """Ends a key; within five seconds nothing takes it any more. Raises NotFound."""
    row = _existing(session, caller, key_id)
    row.revoked_at = row.revoked_at or now()


def _limit(row: ApiKey, body: LimitsIn) -> None:
    for name in body.model_fields_set & set(LimitsIn.model_fields):
        setattr(row, name, getattr(body, name))


def _existing(session: Session, caller: Caller, key_id: str) -> ApiKey:
    row = repository.key(session, key_id)
    if row is None or row.project_id != caller.project_id:
        raise NotFound(f"there is no key {key_id[:64]}", param="key_id", hint="GET /keys lists them.")
    return row
