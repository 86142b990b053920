"""replicas: several engines for one deployment, and what is to replace them

Revision ID: 0008
Revises: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_ONE_EACH = """
    INSERT INTO deployment_replica (id, deployment_id, generation, artifact_id, status, socket, loaded, retiring,
                                    restarts, last_error, parity, ready_at, created_at)
    SELECT d.replica_job_id, d.id, 1, d.artifact_id, d.status, d.socket, '{}', false,
           d.restarts, d.last_error, d.parity, d.ready_at, d.created_at
    FROM deployment d JOIN job j ON j.id = d.replica_job_id
"""
_BACK = """
    UPDATE deployment SET
        replica_job_id = (SELECT max(r.id) FROM deployment_replica r
                          WHERE r.deployment_id = deployment.id AND r.generation = deployment.generation),
        socket = (SELECT max(r.socket) FROM deployment_replica r
                  WHERE r.deployment_id = deployment.id AND r.generation = deployment.generation)
"""


def upgrade() -> None:
    op.create_table(
        "deployment_replica",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("deployment_id", sa.String(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("artifact_id", sa.String(), nullable=True),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("socket", sa.String(), nullable=True),
        sa.Column("loaded", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("retiring", sa.Boolean(), nullable=False),
        sa.Column("restarts", sa.Integer(), nullable=False),
        sa.Column("last_error", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("parity", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("ready_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "status IN ('queued','starting','ready','unhealthy','sleeping','stopped','failed')",
            name=op.f("ck_deployment_replica_status"),
        ),
        sa.ForeignKeyConstraint(["id"], ["job.id"], name=op.f("fk_deployment_replica_id")),
        sa.ForeignKeyConstraint(
            ["deployment_id"], ["deployment.id"], name=op.f("fk_deployment_replica_deployment_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deployment_replica")),
    )
    op.create_index("ix_deployment_replica_deployment_id", "deployment_replica", ["deployment_id"])
    op.add_column("deployment", sa.Column("generation", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("deployment", sa.Column("coming", sa.JSON(none_as_null=True), nullable=True))
    op.execute(_ONE_EACH)
    op.drop_column("deployment", "replica_job_id")
    op.drop_column("deployment", "socket")


def downgrade() -> None:
    op.add_column("deployment", sa.Column("socket", sa.String(), nullable=True))
    op.add_column("deployment", sa.Column("replica_job_id", sa.String(), nullable=True))
    op.execute(_BACK)
    op.drop_column("deployment", "coming")
    op.drop_column("deployment", "generation")
    op.drop_table("deployment_replica")
