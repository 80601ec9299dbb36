"""Of which request an entry of the audit log is, and which evaluations clients have reported."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("audit_log", sa.Column("request_id", sa.String(128)))
    op.add_column("evaluations", sa.Column("measured_by", sa.String(8)))
