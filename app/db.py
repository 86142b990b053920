"""The database: one engine, read and write sessions, SQLite's pragmas.

On SQLite every write transaction is ``BEGIN IMMEDIATE``: a deferred one that reads and then writes fails at once with
SQLITE_BUSY_SNAPSHOT whatever the busy timeout says.
"""

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, DateTime, Dialect, Engine, create_engine, event, make_url, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.exc import TimeoutError as DatabaseTimeout
from sqlalchemy.orm import Session
from sqlalchemy.types import TypeDecorator

from app.disk import Ballast

# 3.7.0–3.51.2 have the WAL-reset race that can lose commits, except these two patched lines.
_WAL_SAFE = (3, 51, 3)
_WAL_PATCHED = {(3, 50, 7), (3, 44, 6)}
_PATIENCE = 20.0


class UtcDateTime(TypeDecorator[datetime]):
    """A UTC time: timezone-aware in Python on both databases."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Stores UTC."""
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """SQLite forgets the zone; what it stores is UTC."""
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


class Database:
    """Opens sessions. Thread-safe; one per process."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = make_engine(url)
        self._writer = self.engine.execution_options(write=True)
        self._writers = threading.Lock()
        file = self.engine.url.database if self.is_sqlite else None
        self.file = Path(file) if file else None
        self.ballast = Ballast(self.file) if self.file is not None else None
        self.damaged = False
        """Whether SQLite has said so; nothing that this process does makes it whole again."""
        event.listen(self.engine, "handle_error", self._on_error)

    @property
    def is_sqlite(self) -> bool:
        """True on SQLite."""
        return self.engine.dialect.name == "sqlite"

    @property
    def missing(self) -> bool:
        """Whether SQLite's file is not there."""
        return self.file is not None and not self.file.exists()

    @property
    def writable(self) -> bool:
        """Whether we may write SQLite's file and, for its journal, the folder."""
        return self.file is None or (os.access(self.file, os.W_OK) and os.access(self.file.parent, os.W_OK))

    def check(self) -> str | None:
        """What SQLite finds wrong with its pages; None when all is well. Reads the whole file."""
        if not self.is_sqlite:
            return None
        with self.engine.connect() as connection:
            found = str(connection.execute(text("PRAGMA quick_check(1)")).scalar())
        return None if found == "ok" else found

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that writes nothing; its transaction ends with the block."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session  # closing, unlike rollback, leaves the loaded rows usable

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that commits when the block ends well; then runs what ``after_commit`` was given.

        Raises DatabaseTimeout when other writers of this process keep SQLite busy. Never open one inside another.
        """
        with self._turn(), Session(self._writer, expire_on_commit=False) as session:
            yield session
            session.commit()
        for action in session.info.get("after_commit", ()):
            action()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """SQLite has one writer: threads of this process queue here instead of polling its lock against each other."""
        if not self.is_sqlite:
            yield
            return
        if not self._writers.acquire(timeout=_PATIENCE):
            raise DatabaseTimeout("the database is busy with other writes of this process")
        try:
            if self.ballast is not None:
                self.ballast.yield_when_tight()
            yield
        finally:
            self._writers.release()

    def _on_error(self, context: ExceptionContext) -> None:
        """A write that did not fit all the same: with the ballast gone the next one does."""
        if self.ballast is not None and is_full(context.original_exception):
            self.ballast.give_up()
        self.damaged = self.damaged or is_damaged(context.original_exception)

    def close(self) -> None:
        """Closes every pooled connection."""
        self.engine.dispose()


def is_full(error: BaseException | None) -> bool:
    """Whether SQLite found no room."""
    return isinstance(error, sqlite3.Error) and "database or disk is full" in str(error)


def was_full(error: BaseException | None) -> bool:
    """Whether an error, or the one that it came of, says so: a full SQLite forgets its savepoints, too."""
    while error is not None and not is_full(error):
        error = error.__cause__ or error.__context__
    return error is not None


def is_damaged(error: BaseException | None) -> bool:
    """Whether SQLite found something else than a database."""
    words = ("malformed", "not a database")
    return isinstance(error, sqlite3.DatabaseError) and any(word in str(error) for word in words)


def after_commit(session: Session, action: Callable[[], None]) -> None:
    """Runs ``action`` once the session's transaction is durable, never otherwise. The same action runs once."""
    actions: dict[Callable[[], None], None] = session.info.setdefault("after_commit", {})
    actions[action] = None


def make_engine(url: str, *, create: bool = False) -> Engine:
    """An engine for SQLite or Postgres with the settings that our promises need.

    Only a migration may ``create`` SQLite's file: to anybody else a missing file is a fault, not an empty database.
    """
    if url.startswith("sqlite"):
        file = str(make_url(url).database)
        engine = create_engine(url, creator=lambda: _open(file, create), pool_size=20)
        event.listen(engine, "connect", _sqlite_connect)
        event.listen(engine, "begin", _sqlite_begin)
        _watch_file(engine, file)
        return engine
    return create_engine(
        url,
        # Whatever the server's default is: each guard is one UPDATE that looks again once its row is free.
        isolation_level="READ COMMITTED",
        pool_size=10,
        max_overflow=20,
        pool_pre_ping=True,
        # As long as a server may pause while another takes over: a connection that is open waits, and a new one
        # must not give up before it. A server that is down refuses at once.
        connect_args={"connect_timeout": 30},
    )


def _open(file: str, create: bool) -> sqlite3.Connection:
    mode = "rwc" if create else "rw"
    return sqlite3.connect(f"file:{quote(file)}?mode={mode}", uri=True, timeout=10, check_same_thread=False)


def _watch_file(engine: Engine, file: str) -> None:
    """SQLite goes on in a file that was deleted or replaced, and nobody finds again what it writes there.

    And a file that was opened without the right to write stays so when the right is there again.
    """

    def identity() -> tuple[int, int] | None:
        with suppress(OSError):
            found = os.stat(file)
            return found.st_dev, found.st_ino
        return None

    def on_connect(_: Any, record: Any) -> None:
        record.info["file"] = identity()
        record.info["writable"] = os.access(file, os.W_OK)

    def on_checkout(_: Any, record: Any, __: Any) -> None:
        if record.info["file"] != identity():
            raise DisconnectionError("the database file was deleted or replaced")
        if not record.info["writable"] and os.access(file, os.W_OK):
            raise DisconnectionError("the database file can be written again")

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "checkout", on_checkout)


def journal_mode(version: tuple[int, ...]) -> str:
    """WAL only where SQLite's WAL-reset race is fixed, else TRUNCATE."""
    return "WAL" if version >= _WAL_SAFE or version in _WAL_PATCHED else "TRUNCATE"


def _sqlite_connect(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves, below
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout=10000")
    cursor.execute(f"PRAGMA journal_mode={journal_mode(sqlite3.sqlite_version_info)}")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _sqlite_begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
