"""registry: aliases, tags, what is known of deleted artifacts, runs that reproduce

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

from migrations import triggers

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job", sa.Column("reproduces", sa.String(), nullable=True))
    op.create_index("ix_job_reproduces", "job", ["reproduces"])
    op.create_table(
        "artifact_tag",
        sa.Column("artifact_id", sa.String(), nullable=False),
        sa.Column("tag", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["artifact_id"], ["artifact.id"], name=op.f("fk_artifact_tag_artifact_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("artifact_id", "tag", name=op.f("pk_artifact_tag")),
    )
    op.create_index("ix_artifact_tag_tag", "artifact_tag", ["tag"])
    op.create_table(
        "deleted_artifact",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=True),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("base_chain", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("base_artifact_id", sa.String(), nullable=True),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_by", sa.String(), nullable=True),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_deleted_artifact_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deleted_artifact")),
    )
    op.create_index("ix_deleted_artifact_name", "deleted_artifact", ["project_id", "name", "version"])
    op.create_table(
        "alias",
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("artifact_id", sa.String(), nullable=False),
        sa.Column("moved_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_alias_project_id")),
        sa.ForeignKeyConstraint(["artifact_id"], ["artifact.id"], name=op.f("fk_alias_artifact_id")),
        sa.PrimaryKeyConstraint("project_id", "name", name=op.f("pk_alias")),
    )
    op.create_index("ix_alias_artifact_id", "alias", ["artifact_id"])
    op.create_table(
        "alias_move",
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("artifact_id", sa.String(), nullable=True),
        sa.Column("version", sa.String(), nullable=True),
        sa.Column("goes_back", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(), nullable=True),
        sa.Column("note", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_alias_move_project_id")),
        sa.PrimaryKeyConstraint("project_id", "name", "seq", name=op.f("pk_alias_move")),
    )
    triggers.create()


def downgrade() -> None:
    for table in ("alias_move", "alias", "deleted_artifact", "artifact_tag"):
        op.drop_table(table)
    op.drop_index("ix_job_reproduces", "job")
    op.drop_column("job", "reproduces")
    triggers.create()
