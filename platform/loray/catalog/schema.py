"""The tables.

tenants          who adapters, keys, jobs and usage belong to; `limits` is spec.Limits as JSON
keys             API keys: the SHA-256 of each, never the key; `prefix` finds it; scopes, models and limits are JSON;
                 `changed_at` of both as of adapters
bases            base models that adapters may belong to
adapters         names as `spec.qualified_name` makes them; bases and adapters share one namespace; `changed_at` is the
                 value of the change counter at the last change of the name, its versions or its aliases;
                 `served_…` are of the version that the bare name means (`queries.count_change` keeps all three);
                 a name with `deleted_at` does not exist until it is restored
shares           the tenants that see a name whose visibility is `shared`
versions         immutable: (adapter, version) and (adapter, digest) are unique; `chat_template` is the SHA-256 of the
                 adapter's own template, whose text is in its manifest; `deleted_at` as of adapters
tags             key and value of a name, as MLflow's; `value_start` is its beginning, which is indexed
aliases          the version of each alias; its revision is the value of the change counter at its last move
alias_moves      every move of an alias; rollback undoes the last one that is not undone; `no_gate` is the reason of a
                 move that the gate refuses
canaries         versions that get, or until `ended_at` got, a share of an alias's requests; `id` is the change counter
                 at the start, `bounds` spec.CanaryBounds as JSON, `reports` what each gateway has counted so far
evaluations      evaluations of a tenant's adapter recorded after it was published, by its digest
uploads          the tenants that have brought the bytes of a digest, which they may register
claims           objects of the store, by their SHA-256, that a publication needs or a collection `deletes`; `removal`
                 says how the two keep out of each other's way
projections      VeRA's pairs by base and tenant, in the order of their first registration; see `adapters`
changes          one row whose counter grows with every write; a writer locks it first, so that writers wait
audit_log        what was done, with its actor and the tenant of its subject, append-only; `hash` is SHA-256 of the
                 entry and of the hash before it (`audit_chain`)
logins           browsers that are logged in at the console, by the SHA-256 of their cookie, which alone opens `sealed`
jobs             training jobs by their submission id; they are kept when the Ray cluster is gone; `cluster` is the one
                 to which an API server submitted the job; `part_of` is the job that trains this adapter among others
clusters         Ray clusters whose API servers use this catalog, and when one of them was last there
quota_owners     who counts limits of keys and tenants in memory, and when it was last there (seconds since the epoch)
quota_levels     what all of them have taken of a limit at the time `at`; rows with an earlier `ends_at` say nothing
quarantine       adapters on which replicas died, by digest; `replica` is the last one, which several gateways may
                 report; `refused_until` is null where an adapter is only suspected
files            files of tenants (`/v1/files`), whose bytes the store has; `expires_at` null: it does not end
batches          requests in files that are answered one by one (`/v1/batches`); `key_id` of who asked; `metadata`,
                 `errors` and what else is not asked for by itself are JSON
leases           what one process at a time does, who that is, and until when (seconds since the epoch, the database's)
tinker_sessions, tinker_models, tinker_samplers, tinker_checkpoints  what Tinker's protocol knows (`spec.tinker`);
                 adapters, references and metadata are JSON
usage            what each request used, by its id, which is unique: an event that comes twice is counted once
usage_days       sums of `usage` by day (UTC, as 2026-01-31), tenant, key and model; `key_id` is empty where there was
                 none
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Computed,
    Connection,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    cast,
    type_coerce,
)


class UtcTime(TypeDecorator[datetime]):
    """A time with its zone, UTC, which SQLite does not store."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value if value is None or value.tzinfo else value.replace(tzinfo=UTC)


# Constraints have explicit names, so that migrations can change them on every database.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

tenants = Table(
    "tenants",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("blocked", Boolean, nullable=False),
    Column("limits", Text, nullable=False),
    Column("changed_at", BigInteger, nullable=False, server_default="0", index=True),
    Column("created_at", UtcTime, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("prefix", String(16), nullable=False, index=True),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("alias", String(96), nullable=False),
    Column("tenant", ForeignKey("tenants.name"), nullable=False, index=True),
    Column("scopes", Text, nullable=False),
    Column("models", Text),
    Column("limits", Text, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("blocked", Boolean, nullable=False),
    Column("created_by", String(96), nullable=False),
    Column("changed_at", BigInteger, nullable=False, server_default="0", index=True),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime),
    Column("revoked_at", UtcTime),
    Column("last_used_at", UtcTime),
)

_FILTERED = ("tenant", "served_method", "served_base")
_LISTED = ("name", *_FILTERED, "visibility", "deleted_at")

bases = Table(
    "bases",
    metadata,
    Column("name", String(96), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("of", String(64)),  # the fingerprint of the 16-bit base whose quantised form it is
)

adapters = Table(
    "adapters",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(96), nullable=False, unique=True),
    Column("tenant", String(32), nullable=False, server_default="default"),
    Column("visibility", String(16), nullable=False, server_default="private"),
    Column("changed_at", BigInteger, nullable=False, server_default="0"),
    Column("served_method", String(16)),
    Column("served_base", String(64)),
    Column("deleted_at", UtcTime),
    Column("created_at", UtcTime, nullable=False),
    Index(None, "changed_at", "id"),
    # Each of these has all that listings ask: a page, whatever it is filtered by, is read in order, from one of them.
    # PostgreSQL also has ix_adapters_trigrams, where it may (`migrations`): parts of names are found by it.
    Index("ix_adapters_by_name", *_LISTED),
    *(Index(f"ix_adapters_by_{column}", column, *(c for c in _LISTED if c != column)) for column in _FILTERED),
)

shares = Table(
    "shares",
    metadata,
    Column("adapter_id", ForeignKey("adapters.id"), primary_key=True),
    Column("tenant", String(32), primary_key=True),
)

TAG_START = 64  # characters of a tag's value by which it is found: PostgreSQL's indexes hold no long texts

tags = Table(
    "tags",
    metadata,
    Column("adapter_id", ForeignKey("adapters.id"), primary_key=True),
    Column("key", String(96), primary_key=True),
    Column("value", Text, nullable=False),
    Column("value_start", String(TAG_START), Computed(f"substr(value, 1, {TAG_START})", persisted=True)),
    Index(None, "key", "value_start", "adapter_id"),
)

versions = Table(
    "versions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("adapter_id", ForeignKey("adapters.id"), nullable=False),
    Column("version", Integer, nullable=False),
    Column("digest", String(64), nullable=False, index=True),
    Column("method", String(16), nullable=False),
    Column("base_fingerprint", String(64), nullable=False),
    Column("context_length", Integer, nullable=False),
    Column("nbytes", BigInteger, nullable=False),
    Column("manifest", Text, nullable=False),
    Column("tool_parser", String(16)),
    Column("chat_template", String(64), index=True),
    Column("deleted_at", UtcTime),
    Column("created_at", UtcTime, nullable=False),
    UniqueConstraint("adapter_id", "version"),
    UniqueConstraint("adapter_id", "digest"),
)


def manifest_as_json(c: Connection) -> ColumnElement[Any]:
    """The manifest of a version, of which a statement asks for parts: `manifest_as_json(c)["rank"].as_integer()`."""
    if c.dialect.name == "sqlite":  # whose JSON is text, and whose CAST would make a number of it
        return type_coerce(versions.c.manifest, JSON)
    return cast(versions.c.manifest, JSON)


aliases = Table(
    "aliases",
    metadata,
    Column("adapter_id", ForeignKey("adapters.id"), primary_key=True),
    Column("alias", String(48), primary_key=True),
    Column("version_id", ForeignKey("versions.id"), nullable=False),
    Column("revision", BigInteger, nullable=False, server_default="0"),
)

alias_moves = Table(
    "alias_moves",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("adapter_id", ForeignKey("adapters.id"), nullable=False),
    Column("alias", String(48), nullable=False),
    Column("version_id", ForeignKey("versions.id"), nullable=False),
    Column("undone", Boolean, nullable=False),
    Column("no_gate", Text),
    Column("created_at", UtcTime, nullable=False),
    Index(None, "adapter_id", "alias"),
)

canaries = Table(
    "canaries",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("adapter_id", ForeignKey("adapters.id"), nullable=False, index=True),
    Column("alias", String(48), nullable=False),
    *(Column(name, ForeignKey("versions.id"), nullable=False) for name in ("stable_id", "version_id")),
    Column("percent", Integer, nullable=False),
    *(Column(name, Text, nullable=False) for name in ("bounds", "reports")),
    Column("created_at", UtcTime, nullable=False),
    Column("ended_at", UtcTime),
    Column("outcome", String(16)),
    Column("reason", Text),
)

uploads = Table(
    "uploads",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("tenant", String(32), primary_key=True),
    Column("created_at", UtcTime, nullable=False),
)

claims = Table(
    "claims",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("claim", String(32), primary_key=True),
    Column("deletes", Boolean, nullable=False),
    Column("claimed_at", UtcTime, nullable=False),
)

evaluations = Table(
    "evaluations",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("digest", String(64), nullable=False, index=True),
    Column("metric", String(64), nullable=False),
    Column("value", Double, nullable=False),
    Column("dataset", Text, nullable=False),
    Column("subject", String(16), nullable=False),
    Column("tenant", String(32), nullable=False, server_default="default"),
    Column("context_length", Integer),
    Column("stride", Integer),
    Column("depth", Double),
    Column("count", Integer),
    Column("data_sha256", String(64)),
    Column("measured_by", String(8)),
    Column("actor", String(96), nullable=False),
    Column("created_at", UtcTime, nullable=False),
)

projections = Table(
    "projections",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("base_fingerprint", String(64), nullable=False),
    Column("tenant", String(32), nullable=False, server_default="default"),
    Column("sha256", String(64), nullable=False),
    Column("key", BigInteger, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("max_in", Integer, nullable=False),
    Column("max_out", Integer, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    UniqueConstraint("base_fingerprint", "tenant", "sha256"),
)

changes = Table(
    "changes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("counter", BigInteger, nullable=False),
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("actor", String(96), nullable=False),
    Column("action", String(32), nullable=False),
    Column("subject", String(200), nullable=False),
    Column("detail", Text, nullable=False),
    Column("tenant", String(32), nullable=False, server_default="default", index=True),
    Column("created_at", UtcTime, nullable=False),
    *(Column(name, String(64)) for name in ("address", "previous_hash", "hash")),
    Column("request_id", String(128)),
)

logins = Table(
    "logins",
    metadata,
    Column("cookie_sha256", String(64), primary_key=True),
    Column("sealed", Text, nullable=False),
    *(Column(name, UtcTime, nullable=False) for name in ("created_at", "used_at")),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("name", String(96), nullable=False, index=True),
    Column("tenant", String(32), nullable=False, server_default="default", index=True),
    Column("recipe", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("version", Integer),
    Column("actor", String(96), nullable=False),
    Column("created_at", UtcTime, nullable=False, index=True),
    Column("started_at", UtcTime),
    Column("ended_at", UtcTime),
    Column("cluster", String(128)),
    Column("part_of", String(128), index=True),
)

clusters = Table(
    "clusters",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("seen_at", UtcTime, nullable=False),
)

quota_owners = Table(
    "quota_owners",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("seen_at", Double, nullable=False),
)

quota_levels = Table(
    "quota_levels",
    metadata,
    Column("rule", String(200), primary_key=True),
    *(Column(name, Double, nullable=False) for name in ("used", "at")),
    Column("ends_at", Double, nullable=False, index=True),
)

quarantine = Table(
    "quarantine",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("deaths", Integer, nullable=False),
    Column("replica", String(96), nullable=False),
    Column("died_at", UtcTime, nullable=False),
    Column("refused_until", UtcTime),
)

files = Table(
    "files",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", String(32), nullable=False),
    Column("account", String(32)),
    Column("filename", Text, nullable=False),
    Column("purpose", String(16), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64)),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, index=True),
    Column("state", String(16), nullable=False),
    Index(None, "tenant", "created_at", "id"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", String(32), nullable=False),
    Column("key_id", String(32)),
    Column("input_file_id", String(32), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("state", String(16), nullable=False, index=True),
    *(Column(name, Text, nullable=False) for name in ("metadata", "errors")),
    *(Column(name, String(32)) for name in ("output_file_id", "error_file_id")),
    *(Column(name, Integer, nullable=False, server_default="0") for name in ("total", "completed", "failed")),
    Column("output_expires_after", Integer),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False),
    *(
        Column(f"{state}_at", UtcTime)
        for state in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    ),
    Index(None, "tenant", "created_at", "id"),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("holder", String(128), nullable=False),
    Column("until", Double, nullable=False),
)

tinker_sessions = Table(
    "tinker_sessions",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(32), nullable=False),
    Column("key_id", String(32)),
    Column("sdk_version", String(64), nullable=False),
    Column("display_name", String(256)),
    Column("metadata", Text, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("seen_at", UtcTime, nullable=False),
    Column("end", String(16), index=True),
    Index(None, "tenant", "created_at", "id"),
)

tinker_models = Table(
    "tinker_models",
    metadata,
    Column("id", String(96), primary_key=True),
    Column("session_id", String(64), nullable=False, index=True),
    Column("tenant", String(32), nullable=False),
    Column("base", String(96), nullable=False),
    Column("base_model", String(256), nullable=False),
    Column("adapter", Text, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("name", String(96), nullable=False),
    Column("initial", String(512)),
    Column("with_optimizer", Boolean, nullable=False),
    Column("metadata", Text, nullable=False),
    *(Column(name, UtcTime, nullable=False) for name in ("created_at", "used_at")),
    Column("is_live", Boolean, nullable=False),
    Column("num_steps", Integer, nullable=False),
    Column("num_tokens", BigInteger, nullable=False),
    Column("loss", Double),
    Index(None, "tenant", "created_at", "id"),
)

tinker_samplers = Table(
    "tinker_samplers",
    metadata,
    Column("id", String(96), primary_key=True),
    Column("session_id", String(64), nullable=False, index=True),
    Column("tenant", String(32), nullable=False),
    Column("base", String(96), nullable=False),
    Column("base_model", String(256), nullable=False),
    Column("path", String(512)),
    Column("adapter", Text),
    Column("holders", Text, nullable=False),
    Column("model_id", String(96), index=True),
    Column("seq", BigInteger),
    Column("inflight", Boolean, nullable=False),
    Column("is_ready", Boolean, nullable=False),
    Column("num_clients", Integer, nullable=False),
)

tinker_checkpoints = Table(
    "tinker_checkpoints",
    metadata,
    Column("model_id", String(96), primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("name", String(96), primary_key=True),
    Column("tenant", String(32), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("folder", Text),
    Column("version", String(200)),
    Column("digest", String(64)),
    Column("nbytes", BigInteger, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, index=True),
    Column("is_ready", Boolean, nullable=False),
    Index(None, "tenant", "created_at"),
    Index(None, "model_id", "seq"),
)

TOKENS = ("num_prompt_tokens", "num_cached_tokens", "num_output_tokens")

usage = Table(
    "usage",
    metadata,
    Column("request_id", String(96), primary_key=True),
    Column("tenant", String(32), nullable=False),
    Column("key_id", String(32)),
    Column("model", String(200), nullable=False),
    Column("digest", String(64)),
    *(Column(name, Integer, nullable=False) for name in TOKENS),
    Column("tier", String(16), nullable=False),
    Column("seconds", Double, nullable=False),
    Column("outcome", String(32), nullable=False),
    Column("created_at", UtcTime, nullable=False, index=True),
    Index(None, "tenant", "created_at"),
)

usage_days = Table(
    "usage_days",
    metadata,
    Column("day", String(10), primary_key=True),
    Column("tenant", String(32), primary_key=True),
    Column("key_id", String(32), primary_key=True),
    Column("model", String(200), primary_key=True),
    Column("num_requests", BigInteger, nullable=False),
    *(Column(name, BigInteger, nullable=False) for name in TOKENS),
    Column("seconds", Double, nullable=False),
    Column("num_batch_tokens", BigInteger, nullable=False, server_default="0"),  # of prompts and answers
    Index(None, "tenant", "day"),
)
