"""`files`, `batches`, `leases`, and the tokens of batches in `usage_days`."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from loray.catalog.schema import batches, files, leases

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    c = op.get_bind()
    for table in (files, batches, leases):
        table.create(c, checkfirst=True)
    if "num_batch_tokens" not in {column["name"] for column in sa.inspect(c).get_columns("usage_days")}:
        op.add_column("usage_days", sa.Column("num_batch_tokens", sa.BigInteger, nullable=False, server_default="0"))
