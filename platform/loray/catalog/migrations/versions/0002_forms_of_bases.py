"""`bases.of`: whose quantised form a base is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if "of" not in {column["name"] for column in sa.inspect(op.get_bind()).get_columns("bases")}:
        op.add_column("bases", sa.Column("of", sa.String(64)))
