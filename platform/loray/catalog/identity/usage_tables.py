"""The tables of usage, in the metadata of `loray.catalog.schema`.

usage       what each request used, by its id, which is unique: an event that comes twice is counted once
usage_days  sums of `usage` by day (UTC, as 2026-01-31), tenant, key and model; `key_id` is empty where there was none
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, DateTime, Double, Index, Integer, String, Table

from loray.catalog.schema import metadata

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
    Column("created_at", DateTime(timezone=True), nullable=False, index=True),
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
    Index(None, "tenant", "day"),
)
