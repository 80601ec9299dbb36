"""Tenants, keys, visibility, tags, soft deletion, usage; the value of the change counter at a name's last change."""

from __future__ import annotations

from contextlib import suppress

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)

# Of the version of alias prod where it is set, else of the newest.
_SERVED = """
UPDATE adapters SET {target} = (
  SELECT v.{column} FROM versions v
  LEFT JOIN aliases a ON a.adapter_id = v.adapter_id AND a.alias = 'prod' AND a.version_id = v.id
  WHERE v.adapter_id = adapters.id
  ORDER BY a.version_id IS NULL, v.version DESC
  LIMIT 1)
"""


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(32), nullable=False),
        sa.Column("blocked", sa.Boolean, nullable=False),
        sa.Column("limits", sa.Text, nullable=False),
        sa.Column("changed_at", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_tenants"),
    )
    op.create_index("ix_tenants_changed_at", "tenants", ["changed_at"])
    op.execute("INSERT INTO tenants VALUES ('default', FALSE, '{}', 0, CURRENT_TIMESTAMP)")
    _create_keys()
    _change_adapters()
    op.add_column("versions", sa.Column("deleted_at", _TIME))
    op.add_column("changes", sa.Column("collections", sa.BigInteger, nullable=False, server_default="0"))
    for table in ("audit_log", "jobs", "evaluations", "projections"):
        op.add_column(table, sa.Column("tenant", sa.String(32), nullable=False, server_default="default"))
    for table in ("audit_log", "jobs"):
        op.create_index(f"ix_{table}_tenant", table, ["tenant"])
    with op.batch_alter_table("projections") as batch:
        batch.drop_constraint("uq_projections_base_fingerprint_sha256", type_="unique")
        batch.create_unique_constraint(
            "uq_projections_base_fingerprint_tenant_sha256", ["base_fingerprint", "tenant", "sha256"]
        )
    op.create_table(
        "uploads",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(32), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("digest", "tenant", name="pk_uploads"),
    )
    _create_usage()
    _index_parts_of_names()


def _index_parts_of_names() -> None:
    """PostgreSQL finds a part of a name by its trigrams. Where it has not the extension, or the role may not create it,
    a search reads all names.
    """
    connection = op.get_bind()
    if connection.dialect.name == "postgresql":
        with suppress(sa.exc.DBAPIError), connection.begin_nested():
            connection.exec_driver_sql("CREATE EXTENSION IF NOT EXISTS pg_trgm")
            connection.exec_driver_sql("CREATE INDEX ix_adapters_trigrams ON adapters USING gin (name gin_trgm_ops)")


def _create_keys() -> None:
    op.create_table(
        "keys",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("prefix", sa.String(16), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("alias", sa.String(96), nullable=False),
        sa.Column("tenant", sa.String(32), nullable=False),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("models", sa.Text),
        sa.Column("limits", sa.Text, nullable=False),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("blocked", sa.Boolean, nullable=False),
        sa.Column("created_by", sa.String(96), nullable=False),
        sa.Column("changed_at", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("expires_at", _TIME),
        sa.Column("revoked_at", _TIME),
        sa.Column("last_used_at", _TIME),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
        sa.UniqueConstraint("sha256", name="uq_keys_sha256"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_keys_tenant"),
    )
    op.create_index("ix_keys_prefix", "keys", ["prefix"])
    op.create_index("ix_keys_tenant", "keys", ["tenant"])
    op.create_index("ix_keys_changed_at", "keys", ["changed_at"])


def _change_adapters() -> None:
    op.add_column("adapters", sa.Column("tenant", sa.String(32), nullable=False, server_default="default"))
    op.add_column("adapters", sa.Column("visibility", sa.String(16), nullable=False, server_default="private"))
    op.add_column("adapters", sa.Column("changed_at", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("adapters", sa.Column("deleted_at", _TIME))
    op.create_index("ix_adapters_changed_at_id", "adapters", ["changed_at", "id"])
    op.add_column("adapters", sa.Column("served_method", sa.String(16)))
    op.add_column("adapters", sa.Column("served_base", sa.String(64)))
    listed = ["name", "tenant", "served_method", "served_base", "visibility", "deleted_at"]
    op.create_index("ix_adapters_by_name", "adapters", listed)
    for column in ("tenant", "served_method", "served_base"):
        op.create_index(f"ix_adapters_by_{column}", "adapters", [column, *(c for c in listed if c != column)])
    op.execute(_SERVED.format(target="served_method", column="method"))
    op.execute(_SERVED.format(target="served_base", column="base_fingerprint"))
    op.create_table(
        "shares",
        sa.Column("adapter_id", sa.Integer, nullable=False),
        sa.Column("tenant", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("adapter_id", "tenant", name="pk_shares"),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name="fk_shares_adapter_id"),
    )
    op.create_table(
        "tags",
        sa.Column("adapter_id", sa.Integer, nullable=False),
        sa.Column("key", sa.String(96), nullable=False),
        sa.Column("value", sa.Text, nullable=False),
        sa.Column("value_start", sa.String(64), sa.Computed("substr(value, 1, 64)", persisted=True)),
        sa.PrimaryKeyConstraint("adapter_id", "key", name="pk_tags"),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name="fk_tags_adapter_id"),
    )
    op.create_index("ix_tags_key_value_start_adapter_id", "tags", ["key", "value_start", "adapter_id"])


def _create_usage() -> None:
    op.create_table(
        "usage",
        sa.Column("request_id", sa.String(96), nullable=False),
        sa.Column("tenant", sa.String(32), nullable=False),
        sa.Column("key_id", sa.String(32)),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("digest", sa.String(64)),
        sa.Column("num_prompt_tokens", sa.Integer, nullable=False),
        sa.Column("num_cached_tokens", sa.Integer, nullable=False),
        sa.Column("num_output_tokens", sa.Integer, nullable=False),
        sa.Column("tier", sa.String(16), nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("outcome", sa.String(32), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("request_id", name="pk_usage"),
    )
    op.create_index("ix_usage_created_at", "usage", ["created_at"])
    op.create_index("ix_usage_tenant_created_at", "usage", ["tenant", "created_at"])
