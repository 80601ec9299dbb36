"""Canaries: versions that get a share of an alias's requests."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "canaries",
        sa.Column("id", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("adapter_id", sa.Integer, nullable=False),
        sa.Column("alias", sa.String(48), nullable=False),
        sa.Column("stable_id", sa.Integer, nullable=False),
        sa.Column("version_id", sa.Integer, nullable=False),
        sa.Column("percent", sa.Integer, nullable=False),
        sa.Column("bounds", sa.Text, nullable=False),
        sa.Column("reports", sa.Text, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("ended_at", _TIME),
        sa.Column("outcome", sa.String(16)),
        sa.Column("reason", sa.Text),
        sa.PrimaryKeyConstraint("id", name="pk_canaries"),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name="fk_canaries_adapter_id"),
        sa.ForeignKeyConstraint(["stable_id"], ["versions.id"], name="fk_canaries_stable_id"),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name="fk_canaries_version_id"),
    )
    op.create_index("ix_canaries_adapter_id", "canaries", ["adapter_id"])
