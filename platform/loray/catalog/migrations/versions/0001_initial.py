"""All tables of `loray.catalog.schema`, as the first release has them, and the rows of an empty catalog."""

from __future__ import annotations

from contextlib import suppress

import sqlalchemy as sa
from alembic import op

from loray.catalog.schema import changes, metadata, tenants
from loray.spec import DEFAULT_TENANT

revision = "0014"  # that of catalogs which were made step by step before the first release
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Of today's schema: later revisions add what they add only where it is missing.
    c = op.get_bind()
    metadata.create_all(c, checkfirst=False)
    tenant = {"name": DEFAULT_TENANT, "blocked": False, "limits": "{}", "created_at": sa.func.now()}
    c.execute(tenants.insert().values(tenant))
    c.execute(changes.insert().values(id=1, counter=0))
    if c.dialect.name == "postgresql":
        # It finds a part of a name by its trigrams. Where it has not the extension, or the role may not create it, a
        # search reads all names.
        with suppress(sa.exc.DBAPIError), c.begin_nested():
            c.exec_driver_sql("CREATE EXTENSION IF NOT EXISTS pg_trgm")
            c.exec_driver_sql("CREATE INDEX ix_adapters_trigrams ON adapters USING gin (name gin_trgm_ops)")
