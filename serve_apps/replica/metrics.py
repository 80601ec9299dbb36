"""A replica's metrics as Prometheus families: its requests, and its engine's totals."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import Metric as Family

from loray.errors import LorayError
from loray.telemetry import METRICS
from serve_apps.exposition import counter, gauge, histogram

if TYPE_CHECKING:
    from loray.engine.stats.stats import EngineStats
    from loray.spec import GenerateRequest, TokenDelta


class ReplicaMetrics:
    """The metrics of a replica's requests. Used from its event loop. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started_at = time.time()
        self._registry = CollectorRegistry()
        self._first_token = self._histogram("time_to_first_token_seconds")
        self._between_tokens = self._histogram("inter_token_latency_seconds")
        self._latency = self._histogram("e2e_request_latency_seconds")
        self._prompt_tokens = self._histogram("request_prompt_tokens")
        self._output_tokens = self._histogram("request_generation_tokens")
        self._ended = self._counter("request_success_total")
        self._errors = self._counter("request_errors_total")

    def _histogram(self, name: str) -> Histogram:
        m = METRICS[name]
        return Histogram(m.name, m.help, m.labels, buckets=m.buckets, registry=self._registry)

    def _counter(self, name: str) -> Counter:
        m = METRICS[name]
        return Counter(m.name, m.help, m.labels, registry=self._registry)

    async def observed(
        self, request: GenerateRequest, deltas: AsyncGenerator[TokenDelta, None]
    ) -> AsyncGenerator[TokenDelta, None]:
        """Passes the deltas on, one token each, and measures them."""
        method = "base" if request.adapter is None else request.adapter.method
        observe_gap = self._between_tokens.labels(method).observe
        began = last = self._clock()
        started = ended = False
        num_output_tokens = 0
        try:
            async with aclosing(deltas) as stream:
                async for delta in stream:
                    now = self._clock()
                    if started:
                        observe_gap(now - last)
                    else:
                        self._first_token.labels(method).observe(now - began)
                        started = True
                    last = now
                    num_output_tokens += len(delta.token_ids)
                    if delta.finish_reason is not None:
                        ended = True
                        self._latency.labels(method).observe(now - began)
                        self._prompt_tokens.labels(method).observe(len(request.prompt_ids))
                        self._output_tokens.labels(method).observe(num_output_tokens)
                        self._ended.labels(method, delta.finish_reason).inc()
                    yield delta
        except Exception as e:
            kind = type(e).__name__ if isinstance(e, LorayError) else "internal"
            self._errors.labels(method, kind).inc()
            ended = True
            raise
        finally:
            if not ended:  # closed or cancelled: the client has disconnected
                self._ended.labels(method, "abort").inc()

    def families(self, stats: EngineStats, replica: str) -> list[Family]:
        """All metrics of this replica, labelled with its name. They can be pickled."""
        families = [*self._registry.collect(), *engine_families(stats)]
        families.append(gauge("replica_start_time_seconds", {(): self._started_at}))
        return [_labelled(family, replica) for family in families]


def engine_families(stats: EngineStats) -> Iterator[Family]:
    """The engine's totals, under the names of `loray.telemetry`."""
    blocks = sum(stats.blocks.values())
    yield gauge("num_requests_running", {(): stats.num_running})
    yield gauge("num_requests_waiting", {(): stats.num_waiting})
    yield gauge("pool_blocks", {(kind,): n for kind, n in stats.blocks.items()})
    yield gauge("kv_cache_usage_ratio", {(): stats.blocks["kv"] / blocks})
    yield gauge(
        "adapters",
        {
            ("pool",): len(stats.adapters_in_pool),
            ("host",): len(stats.adapters_on_host),
            ("loading",): stats.num_loading,
        },
    )
    yield gauge("adapter_host_bytes", {(): stats.host_bytes})
    yield counter("prompt_tokens_total", {(): stats.num_prompt_tokens})
    yield counter("generation_tokens_total", {(): stats.num_output_tokens})
    yield counter("preemptions_total", {(): stats.num_preemptions})
    yield counter("requests_aborted_total", {(): stats.num_aborted})
    yield counter("prefix_cache_queries_total", {(): stats.prefix_cache_queries})
    yield counter("prefix_cache_hits_total", {(): stats.prefix_cache_hits})
    yield counter("engine_steps_total", {(): stats.num_steps})
    yield counter(
        "adapter_requests_total",
        {("pool",): stats.num_pool_hits, ("host",): stats.num_host_hits, ("store",): stats.num_misses},
    )
    yield counter("adapter_loads_total", {(): stats.num_loads})
    yield counter("adapter_load_failures_total", {(): stats.num_failed_loads})
    yield counter("adapter_loaded_bytes_total", {(): stats.num_loaded_bytes})
    yield counter("adapter_evictions_total", {("pool",): stats.num_evictions, ("host",): stats.num_host_evictions})
    yield histogram("engine_step_seconds", {(): stats.step_seconds})
    yield histogram("engine_step_tokens", {(): stats.step_tokens})
    yield histogram("engine_step_adapters", {(): stats.step_adapters})
    yield histogram("adapter_load_seconds", {(): stats.load_seconds})
    yield histogram("request_queue_time_seconds", {(method,): counts for method, counts in stats.queue_seconds.items()})


def _labelled(family: Family, replica: str) -> Family:
    family.samples = [s._replace(labels={"replica": replica, **s.labels}) for s in family.samples]
    return family
