"""What many adapters leave behind: their training jobs, of which some have written events, usage, and the audit log."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks.catalog.fill import adapter_name, insert, tenant_name
from jobs.events import StepEvent, encode
from loray.catalog import Catalog
from loray.catalog.database import open_database, writing
from loray.catalog.schema import audit_log, jobs
from loray.recipes.load import load_recipe
from loray.spec import UsageEvent, split_qualified

_ENDS = ("succeeded",) * 8 + ("failed", "stopped")
_RUNNING = 50  # one in so many
_DAYS = 30
_NUM_STEPS = 20_000
_AT_ONCE = 1000


def fill_history(url: str, num_adapters: int, num_tenants: int) -> list[str]:
    """A job for every tenth adapter, and for each adapter a request in the last days and two lines of the audit log.
    Returns the ids of jobs that have not ended.
    """
    engine, now = open_database(url), datetime.now(UTC)
    recipe = load_recipe("lora_smollm2").spec.model_dump_json()
    numbers, apart = range(1, num_adapters + 1), timedelta(days=_DAYS) / num_adapters
    made = [_job(i, num_tenants, recipe, now - timedelta(seconds=num_adapters - i)) for i in numbers[::10]]
    try:
        with writing(engine) as c:
            insert(c, jobs, made)
            insert(c, audit_log, (line for i in numbers for line in _lines(i, num_tenants, now)))
        _record((_event(i, num_tenants, now - i * apart) for i in numbers), url)
        if engine.dialect.name == "postgresql":
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as c:
                c.exec_driver_sql("ANALYZE")
    finally:
        engine.dispose()
    return [job["id"] for job in made if job["status"] == "running"]


def write_events(url: str, home: Path, tenant: str, num_jobs: int) -> list[str]:
    """The same events for so many ended jobs of a tenant, at most; more than one look reads. Returns the jobs' ids."""
    ended = sa.select(jobs).where(jobs.c.tenant == tenant, jobs.c.status == "succeeded").limit(num_jobs)
    engine, first = open_database(url), home / "events.jsonl"
    home.mkdir(exist_ok=True)
    first.write_text("".join(f"{encode(_step(n))}\n" for n in range(1, _NUM_STEPS + 1)))
    with engine.connect() as c:
        found = c.execute(ended).all()
    engine.dispose()
    for job in found:
        created_at = job.created_at.astimezone(UTC) if job.created_at.tzinfo else job.created_at  # SQLite's are UTC
        folder = home / "runs" / f"_{tenant}" / job.name / f"{created_at:%Y%m%d-%H%M%S}-000000"
        folder.mkdir(parents=True)
        (folder / "job_id").write_text(job.id)
        (folder / "events.jsonl").hardlink_to(first)
    return [job.id for job in found]


def _job(i: int, num_tenants: int, recipe: str, created_at: datetime) -> dict[str, Any]:
    is_running = i // 10 % _RUNNING == 0
    return {
        "id": f"train_{i:06d}",
        "name": split_qualified(adapter_name(i, num_tenants)).name,
        "tenant": tenant_name(i % num_tenants),
        "recipe": recipe,
        "status": "running" if is_running else _ENDS[i // 10 % len(_ENDS)],
        "message": "",
        "version": None,
        "actor": "bench",
        "created_at": created_at,
        "started_at": created_at,
        "ended_at": None if is_running else created_at + timedelta(minutes=1),
    }


def _record(events: Iterator[UsageEvent], url: str) -> None:
    catalog = Catalog(url)
    try:
        while part := list(islice(events, _AT_ONCE)):
            catalog.record_usage(part)
    finally:
        catalog.close()


def _event(i: int, num_tenants: int, created_at: datetime) -> UsageEvent:
    return UsageEvent(
        request_id=f"r{i}",
        tenant=tenant_name(i % num_tenants),
        key_id=f"key-{i % 1000}",
        model=adapter_name(i, num_tenants),
        digest=None,
        num_prompt_tokens=64,
        num_cached_tokens=0,
        num_output_tokens=32,
        tier="pool",
        seconds=1.0,
        outcome="stop",
        created_at=created_at,
    )


def _lines(i: int, num_tenants: int, created_at: datetime) -> Iterator[dict[str, Any]]:
    name, tenant = adapter_name(i, num_tenants), tenant_name(i % num_tenants)
    for action, subject in (("register", f"{name}@1"), ("promote", name)):
        detail = '{"version": 1}'
        common = {"actor": "bench", "detail": detail, "tenant": tenant, "created_at": created_at}
        yield {"action": action, "subject": subject} | common


def _step(n: int) -> StepEvent:
    return {
        "event": "step",
        "step": n,
        "num_steps": _NUM_STEPS,
        "epoch": 0,
        "loss": 2.0 + 2.0 / n,
        "lr": 1e-4,
        "grad_norm": 0.5,
        "tokens_per_s": 1234.5,
        "num_tokens": 512 * n,
        "skipped_steps": 0,
        "eta_s": 60.0,
    }
