"""Permissions of policies that end with time, epochs of announcements, and robots' refusals."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("announcements", sa.Column("epoch", sa.Integer(), server_default="0", nullable=False))
    op.create_table(
        "policy_permissions",
        sa.Column("cohort", sa.String(length=32), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("manifest_sha256", sa.String(length=64), nullable=False),
        sa.Column("issued_at", sa.Double(), nullable=False),
        sa.Column("valid_until", sa.Double(), nullable=False),
        sa.Column("signature", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("cohort", "role", name=op.f("pk_policy_permissions")),
    )
    op.create_table(
        "policy_epochs",
        sa.Column("epoch", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("signature", sa.Text(), nullable=False),
        sa.Column("actor", sa.String(length=64), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("epoch", name=op.f("pk_policy_epochs")),
    )
    op.create_table(
        "policy_refusals",
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("robot_id", sa.String(length=64), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("overruled_by", sa.String(length=64), nullable=True),
        sa.ForeignKeyConstraint(["version"], ["policies.version"], name=op.f("fk_policy_refusals_version_policies")),
        sa.PrimaryKeyConstraint("version", "robot_id", name=op.f("pk_policy_refusals")),
    )


def downgrade() -> None:
    for table in ("policy_refusals", "policy_epochs", "policy_permissions"):
        op.drop_table(table)
    op.drop_column("announcements", "epoch")
