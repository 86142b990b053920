"""The database's schema: upgrade it, check it. Only ``up`` and ``tunesmith migrate`` upgrade."""

import fcntl
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from app.crashpoints import reached
from app.db import Database
from app.settings import PROJECT_ROOT, Settings

POSTGRES_LOCK = 7_385_146


class WrongSchema(RuntimeError):
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


def at_head(database: Database) -> bool:
    """True when the database has exactly this program's schema."""
    with database.engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision() == head()


def require_head(database: Database) -> None:
    """Refuses to work on another schema. Raises WrongSchema."""
    if not at_head(database):
        raise WrongSchema("the database's schema is not this program's; run tunesmith migrate")


def upgrade(settings: Settings) -> None:
    """Brings the database to head; several processes may try at once, one does it."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with (Path(settings.data_dir) / "migrate.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command.upgrade(alembic_config(settings.database), "head")
        reached("migrate.after_upgrade")


def drift(settings: Settings) -> None:
    """Raises alembic's CommandError when the models and the migrations differ."""
    command.check(alembic_config(settings.database))
