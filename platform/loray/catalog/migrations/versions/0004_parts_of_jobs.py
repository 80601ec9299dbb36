"""`jobs.part_of`: the job that trains an adapter among others."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if "part_of" not in {column["name"] for column in sa.inspect(op.get_bind()).get_columns("jobs")}:
        op.add_column("jobs", sa.Column("part_of", sa.String(128)))
        op.create_index("ix_jobs_part_of", "jobs", ["part_of"])
