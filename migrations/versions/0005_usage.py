"""usage: what keys have used, limits of keys, canaries of aliases

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

from migrations import triggers

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent_requests")


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        *(
            sa.Column(name, sa.BigInteger(), nullable=False)
            for name in ("requests", "errors", "prompt_tokens", "completion_tokens", "latency_ms", "first_byte_ms")
        ),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_usage_project_id")),
        sa.PrimaryKeyConstraint("key_id", "model", "day", name=op.f("pk_usage")),
    )
    op.create_index("ix_usage_project_day", "usage", ["project_id", "day"])
    for name in _LIMITS:
        op.add_column("api_key", sa.Column(name, sa.Integer(), nullable=True))
    for name, kind in (
        ("canary_artifact_id", sa.String()),
        ("canary_version", sa.String()),
        ("canary_percent", sa.Double()),
    ):
        op.add_column("alias_move", sa.Column(name, kind, nullable=True))
    with op.batch_alter_table("alias") as batch:
        batch.add_column(sa.Column("canary_artifact_id", sa.String(), nullable=True))
        batch.add_column(sa.Column("canary_percent", sa.Double(), nullable=True))
        batch.create_foreign_key(op.f("fk_alias_canary_artifact_id"), "artifact", ["canary_artifact_id"], ["id"])
        batch.create_index("ix_alias_canary_artifact_id", ["canary_artifact_id"])
    triggers.create()


def downgrade() -> None:
    with op.batch_alter_table("alias") as batch:
        batch.drop_index("ix_alias_canary_artifact_id")
        batch.drop_constraint(op.f("fk_alias_canary_artifact_id"), type_="foreignkey")
        batch.drop_column("canary_percent")
        batch.drop_column("canary_artifact_id")
    for name in ("canary_percent", "canary_version", "canary_artifact_id"):
        op.drop_column("alias_move", name)
    for name in _LIMITS:
        op.drop_column("api_key", name)
    op.drop_table("usage")
    triggers.create()
