"""Episodes with the cohort that their robot had when they were committed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("episodes", sa.Column("cohort", sa.String(length=32), nullable=True))


def downgrade() -> None:
    op.drop_column("episodes", "cohort")
