"""adapters: what deployments of a base are to have loaded, and when they were last used

Revision ID: 0006
Revises: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("deployment", sa.Column("used_at", sa.DateTime(timezone=True), nullable=True))
    op.create_table(
        "deployment_adapter",
        sa.Column("deployment_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("artifact_id", sa.String(), nullable=True),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("effect", sa.Boolean(), nullable=True),
        sa.Column("error", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("loaded_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "status IN ('waiting','ready','evicted','failed')", name=op.f("ck_deployment_adapter_status")
        ),
        sa.ForeignKeyConstraint(
            ["deployment_id"], ["deployment.id"], name=op.f("fk_deployment_adapter_deployment_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_deployment_adapter_project_id")),
        sa.PrimaryKeyConstraint("deployment_id", "name", name=op.f("pk_deployment_adapter")),
        sa.UniqueConstraint("project_id", "name", name=op.f("uq_deployment_adapter_project_id_name")),
    )
    op.create_index("ix_deployment_adapter_artifact_id", "deployment_adapter", ["artifact_id"])


def downgrade() -> None:
    op.drop_table("deployment_adapter")
    op.drop_column("deployment", "used_at")
