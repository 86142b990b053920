"""gguf: artifacts of one more kind, exported files

Revision ID: 0004
Revises: 0003
"""

from alembic import op

from migrations import triggers

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_POINTING_HERE = ("artifact_tag", "alias")


def _kinds(kinds: str) -> None:
    # SQLite cannot change a CHECK: the table is made anew. While it is gone nothing may point to it, and inside a
    # transaction its foreign keys cannot be switched off.
    sqlite = op.get_bind().dialect.name == "sqlite"
    for table in _POINTING_HERE if sqlite else ():
        op.execute(f"CREATE TEMPORARY TABLE kept_{table} AS SELECT * FROM {table}")
        op.execute(f"DELETE FROM {table}")
    with op.batch_alter_table("artifact") as batch:
        batch.drop_constraint(op.f("ck_artifact_kind"), type_="check")
        batch.create_check_constraint(op.f("ck_artifact_kind"), f"kind IN ({kinds})")
    for table in _POINTING_HERE if sqlite else ():
        op.execute(f"INSERT INTO {table} SELECT * FROM kept_{table}")
        op.execute(f"DROP TABLE kept_{table}")
    triggers.create()


def upgrade() -> None:
    _kinds("'adapter','model','reward','report','gguf'")


def downgrade() -> None:
    op.execute("UPDATE artifact SET kind = 'report' WHERE kind = 'gguf'")
    _kinds("'adapter','model','reward','report'")
