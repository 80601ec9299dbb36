"""Who counts limits on this database, and what is used of them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "quota_owners",
        sa.Column("id", sa.String(128), nullable=False),
        sa.Column("seen_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_quota_owners"),
    )
    op.create_table(
        "quota_levels",
        sa.Column("rule", sa.String(200), nullable=False),
        *(sa.Column(name, sa.Double, nullable=False) for name in ("used", "at", "ends_at")),
        sa.PrimaryKeyConstraint("rule", name="pk_quota_levels"),
    )
    op.create_index("ix_quota_levels_ends_at", "quota_levels", ["ends_at"])
