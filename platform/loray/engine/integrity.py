"""A check of an engine's books against each other. Tests call it after every step."""

from __future__ import annotations

from collections import Counter

from loray.engine.pool.packed import PackedAdapter
from loray.engine.pool.pool import Pool
from loray.engine.pool.resident import ResidentAdapter
from loray.engine.residency.residency import Residency
from loray.engine.scheduling.scheduler import Scheduler


def check_integrity(
    scheduler: Scheduler[PackedAdapter, ResidentAdapter],
    residency: Residency[PackedAdapter, ResidentAdapter],
    pool: Pool,
) -> None:
    """AssertionError unless each block is free or held by running requests, the prefix cache or resident adapters, as
    their books say.
    """
    kv = Counter(block for request in scheduler.running for block in request.blocks)
    kv.update(scheduler.prefix_cache.blocks())
    scheduler.prefix_cache.check_integrity()
    pool.check_integrity(kv, residency.table.residents())
    residency.table.check_integrity()
    scheduler.waiting.check_integrity()
    pins = Counter(r.adapter.digest for r in scheduler.running if r.adapter is not None)
    wants = Counter(r.adapter.digest for r in scheduler.waiting if r.adapter is not None)
    assert pins == Counter(residency.table.pins()), "adapter pins differ from the running requests"
    assert wants == Counter(residency.table.wants()), "wanted adapters differ from the waiting requests"
