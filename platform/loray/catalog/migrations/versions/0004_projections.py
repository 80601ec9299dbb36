"""VeRA's pairs by base, those of adapters that were registered before too."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    projections = op.create_table(
        "projections",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("base_fingerprint", sa.String(64), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("key", sa.BigInteger, nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("max_in", sa.Integer, nullable=False),
        sa.Column("max_out", sa.Integer, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_projections"),
        sa.UniqueConstraint("base_fingerprint", "sha256", name="uq_projections_base_fingerprint_sha256"),
    )
    versions = sa.table(
        "versions",
        *map(sa.column, ("id", "method", "base_fingerprint", "manifest")),
        sa.column("created_at", sa.DateTime(timezone=True)),
    )
    query = sa.select(*versions.c).where(versions.c.method == "vera").order_by(versions.c.id)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in op.get_bind().execute(query):
        if pair := json.loads(row.manifest).get("projection"):
            fields = {name: pair[name] for name in ("sha256", "key", "rank", "max_in", "max_out")}
            fields |= {"base_fingerprint": row.base_fingerprint, "created_at": row.created_at}
            found.setdefault((row.base_fingerprint, pair["sha256"]), fields)
    if found:
        op.bulk_insert(projections, list(found.values()))
