"""Sums of usage by day, tenant, key and model, of the events that there are."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_TOKENS = ("num_prompt_tokens", "num_cached_tokens", "num_output_tokens")


def upgrade() -> None:
    op.create_table(
        "usage_days",
        sa.Column("day", sa.String(10), nullable=False),
        sa.Column("tenant", sa.String(32), nullable=False),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("num_requests", sa.BigInteger, nullable=False),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in _TOKENS),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("day", "tenant", "key_id", "model", name="pk_usage_days"),
    )
    op.create_index("ix_usage_days_tenant_day", "usage_days", ["tenant", "day"])
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    if not is_sqlite:  # events that are being written are waited for, and are in the sums
        op.execute("LOCK TABLE usage IN SHARE ROW EXCLUSIVE MODE")
    day = "date(created_at)" if is_sqlite else "to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD')"
    sums = ", ".join(f"sum({name})" for name in _TOKENS)
    op.execute(
        f"INSERT INTO usage_days (day, tenant, key_id, model, num_requests, {', '.join(_TOKENS)}, seconds) "
        f"SELECT {day}, tenant, coalesce(key_id, ''), model, count(*), {sums}, sum(seconds) FROM usage "
        f"GROUP BY {day}, tenant, coalesce(key_id, ''), model"
    )
