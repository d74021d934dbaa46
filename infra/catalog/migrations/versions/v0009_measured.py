"""Measurements by subject and version: a robot's are counted before another is taken."""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(op.f("ix_measurements_subject_version"), "measurements", ["subject", "version"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_measurements_subject_version"), table_name="measurements")
