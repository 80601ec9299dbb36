"""Adapters on which replicas died."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "quarantine",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("deaths", sa.Integer, nullable=False),
        sa.Column("replica", sa.String(96), nullable=False),
        sa.Column("died_at", _TIME, nullable=False),
        sa.Column("refused_until", _TIME),
        sa.PrimaryKeyConstraint("digest", name="pk_quarantine"),
    )
