"""How adapters write tool calls, and their own chat templates. No adapter that was registered before has either."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("versions", sa.Column("tool_parser", sa.String(16)))
    op.add_column("versions", sa.Column("chat_template", sa.String(64)))
    op.create_index("ix_versions_chat_template", "versions", ["chat_template"])
