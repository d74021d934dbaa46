"""Trials of candidates, a stream with its levels, and their episodes; safety events of episodes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None
_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "trials",
        sa.Column("id", _NUMBER, autoincrement=True, nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("candidate", sa.Integer(), nullable=False),
        sa.Column("champion", sa.Integer(), nullable=False),
        sa.Column("reference", sa.Integer(), nullable=False),
        sa.Column("conditions_sha256", sa.String(length=64), nullable=False),
        sa.Column("conditions", sa.JSON(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("level", sa.Double(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("verdict", sa.String(length=16), server_default="", nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["candidate"], ["policies.version"], name=op.f("fk_trials_candidate")),
        sa.ForeignKeyConstraint(["champion"], ["policies.version"], name=op.f("fk_trials_champion")),
        sa.ForeignKeyConstraint(["reference"], ["policies.version"], name=op.f("fk_trials_reference")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_trials")),
        sa.UniqueConstraint(
            "kind", "candidate", "champion", "reference", "conditions_sha256",
            name=op.f("uq_trials_kind_candidate_champion_reference_conditions_sha256"),
        ),
        sa.UniqueConstraint("position", name=op.f("uq_trials_position")),
    )  # fmt: skip
    op.create_table(
        "trial_episodes",
        sa.Column("trial", _NUMBER, nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("task", sa.String(length=64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["trial"], ["trials.id"], name=op.f("fk_trial_episodes_trial")),
        sa.PrimaryKeyConstraint("trial", "version", "task", "number", name=op.f("pk_trial_episodes")),
    )
    op.add_column("snapshot_episodes", sa.Column("safety", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("snapshot_episodes", "safety")
    op.drop_table("trial_episodes")
    op.drop_table("trials")
