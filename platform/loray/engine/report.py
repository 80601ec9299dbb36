"""The figures of an engine at one moment."""

from __future__ import annotations

from loray.engine.pool.packed import PackedAdapter
from loray.engine.pool.pool import Pool
from loray.engine.pool.resident import ResidentAdapter
from loray.engine.residency.residency import Residency
from loray.engine.residency.table import Tier
from loray.engine.scheduling.scheduler import Scheduler
from loray.engine.stats.counters import Counters
from loray.engine.stats.stats import EngineStats


def report(
    counters: Counters,
    scheduler: Scheduler[PackedAdapter, ResidentAdapter],
    residency: Residency[PackedAdapter, ResidentAdapter],
    pool: Pool,
) -> EngineStats:
    """Of the pool's KV blocks those that only the prefix cache holds are `cached`."""
    tiers, counts = residency.table.by_tier(), residency.counts
    blocks, num_cached = pool.allocator.occupancy()._asdict(), scheduler.prefix_cache.num_idle
    return EngineStats(
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        num_loading=len(tiers[Tier.LOADING]),
        blocks=blocks | {"kv": blocks["kv"] - num_cached, "cached": num_cached},
        host_bytes=residency.table.host_used,
        num_steps=counters.num_steps,
        num_prompt_tokens=counters.num_prompt_tokens,
        num_output_tokens=counters.num_output_tokens,
        num_finished=counters.num_finished,
        num_preemptions=scheduler.num_preemptions,
        num_aborted=scheduler.num_aborted,
        num_loads=counts.num_loads,
        num_failed_loads=counts.num_failed_loads,
        num_evictions=counts.num_evictions,
        num_host_evictions=counts.num_host_evictions,
        num_pool_hits=counts.num_pool_hits,
        num_host_hits=counts.num_host_hits,
        num_misses=counts.num_misses,
        num_loaded_bytes=counts.num_loaded_bytes,
        max_adapters_in_step=counters.max_adapters_in_step,
        adapters_in_pool=tuple(ref.digest for ref in tiers[Tier.POOL]),
        adapters_on_host=tuple(ref.digest for ref in tiers[Tier.HOST]),
        adapters_loading=tuple(ref.digest for ref in tiers[Tier.LOADING]),
        prefix_cache_queries=scheduler.prefix_cache_queries,
        prefix_cache_hits=scheduler.prefix_cache_hits,
        step_seconds=counters.step_seconds.counts(),
        step_tokens=counters.step_tokens.counts(),
        step_adapters=counters.step_adapters.counts(),
        load_seconds=residency.load_seconds.counts(),
        queue_seconds={kind: histogram.counts() for kind, histogram in counters.queue_seconds.items()},
    )
