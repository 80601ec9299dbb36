"""Logins at the console; the audit log as a chain of hashes, and from where something was done."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "logins",
        sa.Column("cookie_sha256", sa.String(64), nullable=False),
        sa.Column("sealed", sa.Text, nullable=False),
        *(sa.Column(name, sa.DateTime(timezone=True), nullable=False) for name in ("created_at", "used_at")),
        sa.PrimaryKeyConstraint("cookie_sha256", name="pk_logins"),
    )
    for name in ("address", "previous_hash", "hash"):
        op.add_column("audit_log", sa.Column(name, sa.String(64)))
