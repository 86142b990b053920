"""The database's schema: upgrade it, check it. Only ``up`` and ``tunesmith migrate`` upgrade."""

import fcntl
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import DBAPIError

from app.crashpoints import reached
from app.db import Database
from app.settings import PROJECT_ROOT, Settings

POSTGRES_LOCK = 7_385_146
_RESTORE = "restore it from a backup (docs/operate.md)"


class Unusable(RuntimeError):
    """The database is damaged, out of reach or gone."""


class WrongSchema(Unusable):
    """The database is older or newer than this program."""


def alembic_config(url: str) -> Config:
    """Alembic's configuration, built here so that the installed wheel can migrate too."""
    config = Config()
    config.set_main_option("script_location", str(PROJECT_ROOT / "migrations"))
    config.attributes["url"] = url
    return config


def head() -> str:
    """The newest revision that this program knows."""
    revision = ScriptDirectory.from_config(alembic_config("")).get_current_head()
    assert revision is not None
    return revision


def revision(database: Database) -> str | None:
    """The database's own; None before its first migration."""
    if database.missing:
        return None
    with database.engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def at_head(database: Database) -> bool:
    """True when the database has exactly this program's schema."""
    return revision(database) == head()


def require_head(database: Database) -> None:
    """Refuses to work on another schema, and on a database that is damaged, out of reach or gone. Raises Unusable."""
    if database.missing:
        raise Unusable(f"there is no database at {database.file}; run tunesmith migrate, or {_RESTORE}")
    try:
        current, fault = at_head(database), database.check()
    except DBAPIError as error:
        raise Unusable(f"the database cannot be used: {error.orig}") from error
    if fault is not None:
        raise Unusable(f"the database at {database.file} is damaged ({fault}); {_RESTORE}")
    if not current:
        raise WrongSchema("the database's schema is not this program's; run tunesmith migrate")


def upgrade(settings: Settings) -> None:
    """Brings the database to head; several processes may try at once, one does it. Raises Unusable."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with (Path(settings.data_dir) / "migrate.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _require_ours(settings)
        command.upgrade(alembic_config(settings.database), "head")
        reached("migrate.after_upgrade")


def _require_ours(settings: Settings) -> None:
    """A database of a newer program is left alone; one that is gone is not begun anew over what it knew."""
    database = Database(settings.database)
    try:
        found = revision(database)
    except DBAPIError as error:
        raise Unusable(f"the database cannot be used: {error.orig}") from error
    finally:
        database.close()
    left = [name for name in ("api_key", "artifacts", "files", "jobs") if (settings.data_dir / name).exists()]
    if found is None and left:
        place = database.file or "the address of TUNESMITH_DATABASE_URL"
        raise Unusable(
            f"there is no database at {place}, but {settings.data_dir} holds what one knew ({', '.join(left)}); "
            f"{_RESTORE}, or move these away to begin anew"
        )
    known = {script.revision for script in ScriptDirectory.from_config(alembic_config("")).walk_revisions()}
    if found is not None and found not in known:
        raise WrongSchema(f"the database's schema ({found}) is newer than this program ({head()}); upgrade the program")


def drift(settings: Settings) -> None:
    """Raises alembic's CommandError when the models and the migrations differ."""
    command.check(alembic_config(settings.database))
