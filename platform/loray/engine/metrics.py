"""The figures of an engine: counters, histograms, and the usage of its adapters."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pydantic import ConfigDict, SkipValidation

from loray.engine.request import Request
from loray.spec import AdapterRef, EngineFigures
from loray.telemetry import METRICS, HistogramCounts


class Histogram:
    """Written by one thread. `bounds` are inclusive upper bounds in ascending order, as in Prometheus."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def counts(self) -> HistogramCounts:
        return HistogramCounts(self._bounds, tuple(self._counts), self._sum)


class Counters:
    """Totals since the start. A prompt token counts once: preempted or not, computed or found in the prefix cache."""

    def __init__(self) -> None:
        self.num_requests = self.num_finished = 0
        self.num_steps = self.num_prompt_tokens = self.num_output_tokens = 0
        self.max_adapters_in_step = 0
        self.num_draft_tokens = self.num_accepted_tokens = 0
        self.step_seconds = Histogram(METRICS["engine_step_seconds"].buckets)
        self.step_tokens = Histogram(METRICS["engine_step_tokens"].buckets)
        self.step_adapters = Histogram(METRICS["engine_step_adapters"].buckets)
        self.queue_seconds: dict[str, Histogram] = {}
        self.first_step: Callable[[str, float], None] | None = None  # called with a traced request's id and the time

    def scheduled(self, requests: Iterable[Request], now: float) -> None:
        """Count the seconds that requests waited for their first step; those that ran before are left out."""
        for request in requests:
            if request.queued_at is not None:
                kind = "base" if request.adapter is None else request.adapter.method
                if kind not in self.queue_seconds:
                    self.queue_seconds[kind] = Histogram(METRICS["request_queue_time_seconds"].buckets)
                self.queue_seconds[kind].observe(now - request.queued_at)
                request.queued_at = None
                if self.first_step is not None and request.spec.traceparent is not None:
                    self.first_step(request.request_id, now)

    def computed(self, request: Request) -> None:
        """Count the tokens by which `num_computed` of the request has grown."""
        prompt = min(request.num_computed, request.num_prompt_tokens)
        self.num_prompt_tokens += max(0, prompt - request.num_prompt_counted)
        request.num_prompt_counted = max(prompt, request.num_prompt_counted)

    def stepped(self, num_tokens: int, num_adapters: int, seconds: float) -> None:
        self.num_steps += 1
        self.max_adapters_in_step = max(self.max_adapters_in_step, num_adapters)
        self.step_seconds.observe(seconds)
        self.step_tokens.observe(num_tokens)
        self.step_adapters.observe(num_adapters)


class EngineStats(EngineFigures):
    """`EngineFigures` and what else the metrics show.

    adapters_in_pool       digests; adapters_on_host: of those that are on the host and not in the pool;
                           adapters_loading: on their way from the store
    prefixes               names of prefixes in the pool or on the host that routers are told, see `policy.prefixes`
    prefix_cache_queries   prompt tokens looked up in the prefix cache; prefix_cache_hits: those found there
    num_draft_tokens       guessed tokens that were computed; num_accepted_tokens: those that were right
    queue_seconds          by the adapter's method, or "base"
    """

    model_config = ConfigDict(extra="forbid")

    adapters_in_pool: SkipValidation[tuple[str, ...]]
    adapters_on_host: SkipValidation[tuple[str, ...]]
    adapters_loading: SkipValidation[tuple[str, ...]]
    prefix_cache_queries: int
    prefix_cache_hits: int
    prefixes: tuple[str, ...]
    num_draft_tokens: int
    num_accepted_tokens: int
    step_seconds: SkipValidation[HistogramCounts]
    step_tokens: SkipValidation[HistogramCounts]
    step_adapters: SkipValidation[HistogramCounts]
    load_seconds: SkipValidation[HistogramCounts]
    queue_seconds: SkipValidation[dict[str, HistogramCounts]]


@dataclass(slots=True)
class AdapterUsage:
    """`last_used_at`: seconds since the epoch. `num_tokens`: of prompt and output, counted as requests end."""

    ref: AdapterRef
    last_used_at: float
    num_uses: int = 0
    num_tokens: int = 0


@dataclass(slots=True)
class ResidencyCounts:
    """Totals. Hits and misses are requests, by where their adapter was when they came; a preempted request counts
    once. A load counts when it starts, its bytes (in host memory) when it is complete.

    num_evictions       from the pool; most of these adapters stay on the host
    num_host_evictions  from host memory
    """

    num_pool_hits: int = 0
    num_host_hits: int = 0
    num_misses: int = 0
    num_loads: int = 0
    num_failed_loads: int = 0
    num_loaded_bytes: int = 0
    num_evictions: int = 0
    num_host_evictions: int = 0
