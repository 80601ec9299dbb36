"""Run by Alembic, in the connection and transaction of `loray.catalog.database`."""

from __future__ import annotations

from alembic import context

from loray.catalog.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transaction_per_migration=False,
)
context.run_migrations()
