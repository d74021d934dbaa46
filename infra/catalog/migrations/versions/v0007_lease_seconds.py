"""Leases tell how long they last, so that an end which a wrong clock wrote can be told from a true one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("leases", sa.Column("seconds", sa.Double(), nullable=False, server_default="60"))


def downgrade() -> None:
    op.drop_column("leases", "seconds")
