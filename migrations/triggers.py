"""Triggers on ``job``: terminal is final, in the database.

Alembic's batch mode on SQLite drops triggers, so every migration that touches ``job`` ends with ``create``.
"""

from alembic import op

_SQLITE = """
CREATE TRIGGER IF NOT EXISTS job_final BEFORE UPDATE OF state ON job
WHEN old.state IN ('succeeded','failed','cancelled') AND new.state <> old.state
BEGIN SELECT RAISE(ABORT, 'terminal state'); END
"""
_FUNCTION = """
CREATE OR REPLACE FUNCTION job_final() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION 'terminal state' USING ERRCODE = 'check_violation'; END $$
"""
_POSTGRES = """
CREATE OR REPLACE TRIGGER job_final BEFORE UPDATE OF state ON job FOR EACH ROW
WHEN (old.state IN ('succeeded','failed','cancelled') AND new.state <> old.state)
EXECUTE FUNCTION job_final()
"""


def create() -> None:
    """Makes the triggers, if they are not there."""
    if op.get_bind().dialect.name == "sqlite":
        op.execute(_SQLITE)
    else:
        op.execute(_FUNCTION)
        op.execute(_POSTGRES)


def drop() -> None:
    """Takes them away, before the table goes."""
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TRIGGER IF EXISTS job_final")
    else:
        op.execute("DROP TRIGGER IF EXISTS job_final ON job")
        op.execute("DROP FUNCTION IF EXISTS job_final()")
