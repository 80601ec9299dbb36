"""What an engine says about itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from loray.telemetry import HistogramCounts


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment's state and totals since the start. Blocks are the pool's, by what they hold.

    kv                     blocks that requests hold; those that the prefix cache alone holds are `cached`
    prefix_cache_queries   prompt tokens looked up in the prefix cache, `hits` those found there
    """

    num_running: int
    num_waiting: int
    num_loading: int
    blocks: dict[str, int]
    adapters_in_pool: tuple[str, ...]
    adapters_on_host: tuple[str, ...]
    host_bytes: int
    num_steps: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_finished: int
    num_preemptions: int
    num_aborted: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_loads: int
    num_failed_loads: int
    num_evictions: int
    num_host_evictions: int
    num_pool_hits: int
    num_host_hits: int
    num_misses: int
    num_loaded_bytes: int
    max_adapters_in_step: int
    step_seconds: HistogramCounts
    step_tokens: HistogramCounts
    step_adapters: HistogramCounts
    load_seconds: HistogramCounts
    queue_seconds: dict[str, HistogramCounts]  # by the adapter's method, or "base"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
