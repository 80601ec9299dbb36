"""Evaluations of published adapters, and the reasons for which aliases were moved past the gate."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("alias_moves", sa.Column("no_gate", sa.Text, nullable=True))
    op.create_table(
        "evaluations",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("metric", sa.String(64), nullable=False),
        sa.Column("value", sa.Double, nullable=False),
        sa.Column("dataset", sa.Text, nullable=False),
        sa.Column("subject", sa.String(16), nullable=False),
        sa.Column("context_length", sa.Integer, nullable=True),
        sa.Column("stride", sa.Integer, nullable=True),
        sa.Column("depth", sa.Double, nullable=True),
        sa.Column("count", sa.Integer, nullable=True),
        sa.Column("data_sha256", sa.String(64), nullable=True),
        sa.Column("actor", sa.String(96), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_evaluations"),
    )
    op.create_index("ix_evaluations_digest", "evaluations", ["digest"])
