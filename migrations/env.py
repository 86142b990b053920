"""Alembic's entry: runs the migrations on the database that ``app.schema`` names."""

from alembic import context
from sqlalchemy import text

from app.crashpoints import reached
from app.db import make_engine
from app.models import Base
from app.schema import POSTGRES_LOCK


def run() -> None:
    """Upgrades inside one transaction: BEGIN IMMEDIATE on SQLite, under an advisory lock on Postgres."""
    engine = make_engine(context.config.attributes["url"], create=True)
    try:
        with engine.execution_options(write=True).connect() as connection:
            sqlite = connection.dialect.name == "sqlite"
            context.configure(
                connection=connection,
                target_metadata=Base.metadata,
                render_as_batch=sqlite,
                transactional_ddl=True,
                compare_type=True,
                on_version_apply=lambda **_: reached("migrate.revision"),
            )
            with context.begin_transaction():
                if not sqlite:
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": POSTGRES_LOCK})
                context.run_migrations()
    finally:
        engine.dispose()


run()
