"""A replica's metrics, its status, and the adapters that it has."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import Metric as Family

from loray.engine.memory.adapter_manager import Prefetched
from loray.engine.metrics import Histogram as CountedHistogram
from loray.errors import LorayError
from loray.schemas.status import AdapterPlacement, ReplicaStatus
from loray.telemetry import METRICS
from serve_apps.exposition import Labels, counter, gauge, histogram, labelled

if TYPE_CHECKING:
    from loray.engine.async_engine import AsyncEngine
    from loray.engine.metrics import EngineStats
    from loray.engine.request import TokenOutput
    from loray.spec import GenerateRequest
    from loray.telemetry import HistogramCounts


Source = Literal["cache", "store", "actor"]  # of an adapter's bytes; actor: of an ephemeral one


@dataclass(slots=True, eq=False)
class RequestTimes:
    """A request under way. Times in seconds of the metrics' clock. The engine's thread writes all but the first three.

    last      of its last token, or its arrival
    first     of its first token
    started   it has a token
    finished  it has its last one
    resumed   its first tokens are another replica's; `num_output_tokens` counts them too
    """

    method: str
    num_prompt_tokens: int
    arrived: float
    last: float
    first: float | None = None
    started: bool = False
    finished: bool = False
    num_output_tokens: int = 0
    resumed: bool = False


class LoadCounts:
    """Counts where adapters were loaded from. Used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.sources: dict[Labels, float] = {(source,): 0 for source in get_args(Source)}

    def began(self, source: Source) -> None:
        with self._lock:
            self.sources[source,] += 1


class WarmStart(NamedTuple):
    """Adapters that a replica loaded before it took requests, and how long that took."""

    adapters: Prefetched = Prefetched()
    seconds: float = 0.0


class ReplicaMetrics:
    """The metrics of a replica's requests. `clock` returns seconds.

    `stepped` is called in the engine's thread, everything else from one event loop.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        loads: LoadCounts | None = None,
        warm_start: WarmStart | None = None,
    ) -> None:
        self._clock, self._loads, self._warm_start = clock, loads or LoadCounts(), warm_start or WarmStart()
        self._started_at = time.time()
        self._registry = CollectorRegistry()
        self._between_tokens: dict[str, CountedHistogram] = {}
        self._first_token = self._histogram("time_to_first_token_seconds")
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

    def arrived(self, request: GenerateRequest) -> RequestTimes:
        now = self._clock()
        method = "base" if request.adapter is None else request.adapter.method
        if method not in self._between_tokens:
            buckets = METRICS["inter_token_latency_seconds"].buckets
            self._between_tokens = {**self._between_tokens, method: CountedHistogram(buckets)}
        num_output, prompt = len(request.output_ids), len(request.prompt_ids)
        return RequestTimes(method, prompt, now, now, num_output_tokens=num_output, resumed=num_output > 0)

    def stepped(self, results: Sequence[tuple[RequestTimes, TokenOutput]]) -> None:
        """Take one step's results. Those that had their last token at the same time have the same latency."""
        now = self._clock()
        gaps: dict[tuple[str, float], int] = {}
        for times, out in results:
            if times.started:
                key = times.method, times.last
                gaps[key] = gaps.get(key, 0) + 1
            else:
                times.started, times.first = True, now
                if not times.resumed:
                    self._first_token.labels(times.method).observe(now - times.arrived)
            times.last = now
            if out.token_id is not None:
                times.num_output_tokens += 1
            if out.finish_reason is not None:
                times.finished = True
        for (method, last), num in gaps.items():
            self._between_tokens[method].observe(now - last, num)

    def ended(self, times: RequestTimes, how: str | Exception) -> None:
        """Count the end of a request. `how`: a finish reason, "abort" if the caller has left, or the error."""
        if isinstance(how, Exception):
            kind = type(how).__name__ if isinstance(how, LorayError) else "internal"
            self._errors.labels(times.method, kind).inc()
            return
        self._ended.labels(times.method, how).inc()
        if how != "abort":
            self._latency.labels(times.method).observe(times.last - times.arrived)
            self._prompt_tokens.labels(times.method).observe(times.num_prompt_tokens)
            self._output_tokens.labels(times.method).observe(times.num_output_tokens)

    def families(self, stats: EngineStats, replica: str) -> list[Family]:
        """Collect all metrics of this replica, labelled with its name. They can be pickled."""
        own = [gauge("replica_start_time_seconds", {(): self._started_at}), *self._load_families()]
        return labelled([*self.request_families(), *engine_families(stats), *own], replica=replica)

    def _load_families(self) -> Iterator[Family]:
        yield counter("adapter_sources_total", self._loads.sources)
        warm, seconds = self._warm_start
        outcomes = {
            "pool": warm.num_in_pool,
            "host": warm.num_on_host,
            "failed": warm.num_failed,
            "late": warm.num_late,
        }
        yield gauge("warm_start_adapters", {(outcome,): n for outcome, n in outcomes.items()})
        yield gauge("warm_start_seconds", {(): seconds})

    def request_families(self) -> list[Family]:
        between: dict[Labels, HistogramCounts] = {(m,): counted.counts() for m, counted in self._between_tokens.items()}
        return [*self._registry.collect(), histogram("inter_token_latency_seconds", between)]


def engine_families(stats: EngineStats) -> Iterator[Family]:
    """Make families of the engine's totals, under the names of `loray.telemetry`."""
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
    yield counter("spec_decode_num_draft_tokens_total", {(): stats.num_draft_tokens})
    yield counter("spec_decode_num_accepted_tokens_total", {(): stats.num_accepted_tokens})
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


def replica_status(engine: AsyncEngine, replica: str, started_at: float) -> ReplicaStatus:
    """Describe the replica; adapters are named by digest. `started_at`: seconds since the epoch."""
    return ReplicaStatus(
        replica=replica,
        node=socket.gethostname(),
        pid=os.getpid(),
        uptime_s=time.time() - started_at,
        **dict(engine.stats()),
    )


async def placements(
    engine: AsyncEngine, replica: str, digests: Collection[str] | None = None
) -> list[AdapterPlacement]:
    """Say where these adapters are, or all that the engine has loaded. Those never used here, or not for long, are
    left out. Raises EngineError if the engine has stopped.
    """
    node = socket.gethostname()
    return [
        AdapterPlacement(
            replica=replica,
            node=node,
            digest=placement.ref.digest,
            name=placement.ref.name,
            version=placement.ref.version,
            nbytes=placement.ref.nbytes,
            tier=placement.place or "none",
            uses=placement.num_uses,
            last_used_at=placement.last_used_at,
            num_tokens=placement.num_tokens,
        )
        for placement in await engine.adapters(digests)
    ]
