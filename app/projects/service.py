"""API keys: made once, stored as a hash, checked in constant time."""

import hashlib
import hmac
import logging
import secrets
import threading
import time

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.db import Database
from app.errors import Code, Unauthorized
from app.models import DEFAULT_PROJECT, ApiKey, now
from app.projects import repository
from app.projects.caller import Caller, KeyLimits

SCOPES = ("read", "submit", "serve", "admin")
_CACHE_SECONDS = 5.0
_FRESH_SECONDS = 3.0
"""From then on one request has the key looked up while the others go on with what is remembered."""
log = logging.getLogger(__name__)


def create_key(session: Session, name: str, project_id: str = DEFAULT_PROJECT, scopes: tuple[str, ...] = SCOPES) -> str:
    """A new key ``ts_<id>_<secret>``; this is the only time that it can be seen."""
    repository.ensure_default(session)
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    session.add(ApiKey(id=key_id, project_id=project_id, name=name, secret_sha256=_hash(secret), scopes=list(scopes)))
    return f"ts_{key_id}_{secret}"


def first_key(session: Session) -> str | None:
    """The bootstrap key, if there is none at all yet."""
    return create_key(session, "bootstrap") if repository.count_keys(session) == 0 else None


class KeyRing:
    """Checks keys, remembering good ones for 5 s so that a busy client costs no query a request."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[str, tuple[float, Caller]] = {}
        self._refreshing: set[str] = set()
        self._lock = threading.Lock()

    def check(self, authorization: str | None) -> Caller:
        """The caller behind an ``Authorization`` header. Raises Unauthorized."""
        if not authorization:
            raise Unauthorized(
                "no API key was sent",
                code=Code.MISSING_API_KEY,
                hint="Send Authorization: Bearer <key>, or x-api-key: <key>; the first key lies in DATA_DIR/api_key.",
            )
        scheme, _, key = authorization.partition(" ")
        parts = key.strip().split("_", 2)
        if scheme.lower() != "bearer" or len(parts) != 3 or parts[0] != "ts" or not key.isascii():
            raise _wrong()
        digest = _hash(key.strip())
        seen = self._seen(digest)
        return seen[1] if seen is not None else self._learn(digest, parts[1], parts[2])

    def _learn(self, digest: str, key_id: str, secret: str) -> Caller:
        caller = self._look_up(key_id, secret)
        with self._lock:
            if len(self._known) > 10_000:
                self._known.clear()
            self._known[digest] = (time.monotonic(), caller)
        return caller

    def remembered(self, authorization: str | None) -> tuple[Caller | None, bool]:
        """As ``check``, without the database: None where that would have to be asked, or would raise.

        And whether the caller of this method, and no other, should ``refresh`` the key, in a thread.
        """
        if authorization is None or authorization[:7].lower() != "bearer ":
            return None, False
        digest = _hash(authorization[7:].strip())
        seen = self._seen(digest)
        if seen is None:
            return None, False
        with self._lock:
            due = time.monotonic() - seen[0] >= _FRESH_SECONDS and digest not in self._refreshing
            if due:
                self._refreshing.add(digest)
        return seen[1], due

    def refresh(self, authorization: str) -> None:
        """Looks a remembered key up again before it is forgotten: a busy client never waits for the database."""
        key = authorization[7:].strip()
        digest, (_, key_id, secret) = _hash(key), key.split("_", 2)
        try:
            self._learn(digest, key_id, secret)
        except Unauthorized:
            with self._lock:
                self._known.pop(digest, None)
        except SQLAlchemyError as error:
            log.info("a key is looked up again later: %s", type(error).__name__)
        finally:
            with self._lock:
                self._refreshing.discard(digest)

    def _seen(self, digest: str) -> tuple[float, Caller] | None:
        with self._lock:
            seen = self._known.get(digest)
        return seen if seen and time.monotonic() - seen[0] < _CACHE_SECONDS else None

    def _look_up(self, key_id: str, secret: str) -> Caller:
        with self._database.read() as session:
            row = repository.key(session, key_id)
        # The comparison is made even for an unknown id, so that timing tells nothing.
        good = hmac.compare_digest(_hash(secret), row.secret_sha256 if row else _hash(""))
        if row is None or not good or row.revoked_at or (row.expires_at and row.expires_at < now()):
            raise _wrong()
        limits = KeyLimits(row.requests_per_minute, row.tokens_per_minute, row.concurrent_requests)
        return Caller(row.project_id, row.id, frozenset(row.scopes), limits)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _wrong() -> Unauthorized:
    return Unauthorized(
        "the API key is not valid", hint="Check it for a missing part; keys look like ts_<id>_<secret>."
    )
