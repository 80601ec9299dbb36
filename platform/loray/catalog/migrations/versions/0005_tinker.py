"""`tinker_sessions`, `tinker_models`, `tinker_samplers` and `tinker_checkpoints`."""

from __future__ import annotations

from alembic import op

from loray.catalog.schema import tinker_checkpoints, tinker_models, tinker_samplers, tinker_sessions

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in (tinker_sessions, tinker_models, tinker_samplers, tinker_checkpoints):
        table.create(op.get_bind(), checkfirst=True)
