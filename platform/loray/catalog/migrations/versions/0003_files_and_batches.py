"""`files`, `batches` and `leases`."""

from __future__ import annotations

from alembic import op

from loray.catalog.schema import batches, files, leases

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in (files, batches, leases):
        table.create(op.get_bind(), checkfirst=True)
