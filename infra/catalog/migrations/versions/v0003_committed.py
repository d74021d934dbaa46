"""Episodes by the time of their commit: the reconciler looks at those since its last look."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(op.f("ix_episodes_committed_at"), "episodes", ["committed_at"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_episodes_committed_at"), table_name="episodes")
