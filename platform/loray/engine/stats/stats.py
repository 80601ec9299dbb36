"""The figures that an engine reports."""

from __future__ import annotations

from pydantic import ConfigDict, SkipValidation

from loray.spec import EngineFigures
from loray.telemetry import HistogramCounts


class EngineStats(EngineFigures):
    """`EngineFigures` and what else the metrics show.

    adapters_in_pool       digests; adapters_on_host: of those that are on the host and not in the pool;
                           adapters_loading: on their way from the store
    prefix_cache_queries   prompt tokens looked up in the prefix cache; prefix_cache_hits: those found there
    queue_seconds          by the adapter's method, or "base"
    """

    model_config = ConfigDict(extra="forbid")

    adapters_in_pool: SkipValidation[tuple[str, ...]]
    adapters_on_host: SkipValidation[tuple[str, ...]]
    adapters_loading: SkipValidation[tuple[str, ...]]
    prefix_cache_queries: int
    prefix_cache_hits: int
    step_seconds: SkipValidation[HistogramCounts]
    step_tokens: SkipValidation[HistogramCounts]
    step_adapters: SkipValidation[HistogramCounts]
    load_seconds: SkipValidation[HistogramCounts]
    queue_seconds: SkipValidation[dict[str, HistogramCounts]]
