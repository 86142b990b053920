"""parity: whether a deployment's engine says what transformers says

Revision ID: 0007
Revises: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("deployment", sa.Column("parity", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    op.drop_column("deployment", "parity")
