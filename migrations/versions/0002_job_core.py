"""job core: scheduling, limits, pipelines, sweeps

Revision ID: 0002
Revises: 0001
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

from migrations import triggers

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def _columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("next_class", sa.String(), nullable=True),
        sa.Column("prepared_ref", sa.String(), nullable=True),
        sa.Column("gpus", sa.Integer(), nullable=False, server_default=sa.text("1")),
        sa.Column("min_vram_gb", sa.Double(), nullable=True),
        sa.Column("memory_gb", sa.Double(), nullable=True),
        sa.Column("preemptible", sa.Boolean(), nullable=False, server_default=sa.text("false")),
        sa.Column("preempt_for", sa.String(), nullable=True),
        sa.Column("queue_seconds", sa.Double(), nullable=True),
        sa.Column("wall_seconds", sa.Double(), nullable=True),
        sa.Column("run_seconds", sa.Double(), nullable=False, server_default=sa.text("0")),
        sa.Column("eligible_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("reached_step", sa.Integer(), nullable=False, server_default=sa.text("-1")),
        sa.Column("stuck", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("sweep_id", sa.String(), nullable=True),
    ]


def upgrade() -> None:
    for column in _columns():
        op.add_column("job", column)
    op.create_index("ix_job_pipeline_id", "job", ["pipeline_id"])
    op.create_index("ix_job_preempt_for", "job", ["preempt_for"])
    op.create_index("ix_job_finished", "job", ["type", "state", "finished_at"])
    op.create_index("ix_job_sweep_id", "job", ["sweep_id"])
    op.add_column(
        "slot", sa.Column("facts", sa.JSON(none_as_null=True), nullable=False, server_default=sa.text("'{}'"))
    )
    op.create_table(
        "pipeline",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("spec", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("metadata", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("idem_key", sa.String(), nullable=True),
        sa.Column("idem_sha256", sa.String(), nullable=True),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_pipeline_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pipeline")),
        sa.UniqueConstraint("project_id", "idem_key", name=op.f("uq_pipeline_project_id_idem_key")),
    )
    op.create_index("ix_pipeline_project_created", "pipeline", ["project_id", "created_at", "id"])
    op.create_table(
        "pipeline_step",
        sa.Column("pipeline_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["pipeline_id"], ["pipeline.id"], name=op.f("fk_pipeline_step_pipeline_id")),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_pipeline_step_job_id")),
        sa.PrimaryKeyConstraint("pipeline_id", "name", name=op.f("pk_pipeline_step")),
    )
    op.create_index("ix_pipeline_step_job_id", "pipeline_step", ["job_id"])
    op.create_table(
        "sweep",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("spec", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("matrix", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("options", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("max_parallel", sa.Integer(), nullable=True),
        sa.Column("metadata", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("result", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("idem_key", sa.String(), nullable=True),
        sa.Column("idem_sha256", sa.String(), nullable=True),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_sweep_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sweep")),
        sa.UniqueConstraint("project_id", "idem_key", name=op.f("uq_sweep_project_id_idem_key")),
    )
    op.create_index("ix_sweep_project_created", "sweep", ["project_id", "created_at", "id"])
    op.create_table(
        "sweep_point",
        sa.Column("sweep_id", sa.String(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("point", sa.JSON(none_as_null=True), nullable=False),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweep.id"], name=op.f("fk_sweep_point_sweep_id")),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_sweep_point_job_id")),
        sa.PrimaryKeyConstraint("sweep_id", "position", name=op.f("pk_sweep_point")),
    )
    op.create_index("ix_sweep_point_job_id", "sweep_point", ["job_id"])
    triggers.create()


def downgrade() -> None:
    for table in ("sweep_point", "sweep", "pipeline_step", "pipeline"):
        op.drop_table(table)
    op.drop_column("slot", "facts")
    op.drop_index("ix_job_sweep_id", "job")
    op.drop_index("ix_job_finished", "job")
    op.drop_index("ix_job_preempt_for", "job")
    op.drop_index("ix_job_pipeline_id", "job")
    for column in reversed(_columns()):
        op.drop_column("job", column.name)
    triggers.create()
