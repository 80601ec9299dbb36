"""The figures of a row, computed from the times of tokens and engine steps; in seconds and bytes."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.machine import MachineRates
from benchmarks.serving.figures.floors import ModelSize, decode_step_seconds, most_tokens_per_second
from benchmarks.serving.recorder import EngineStep
from benchmarks.serving.replay import Record
from loray.engine.metrics import EngineStats


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of one pass, or medians over passes.

    throughput    output tokens/s from the first sent request to the last token
    prompt_rate   prompt tokens/s from the first sent request to the last request's first token
    ttft, itl     seconds to the first token, and between two tokens of a request
    slo           share of requests whose first token came in time; failed requests count as late
    """

    throughput: float
    prompt_rate: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    slo: float
    num_failed: int


def latencies(records: Sequence[Record], slo_s: float) -> Latencies:
    """Latencies of one pass. `slo_s`: seconds within which the first token is in time."""
    good = [r for r in records if r.error is None and r.times]
    began = min(r.sent for r in records)
    first = sorted(r.times[0] - r.sent for r in good)
    between = sorted(b - a for r in good for a, b in itertools.pairwise(r.times))
    last = max((r.times[-1] for r in good), default=began)
    last_first = max((r.times[0] for r in good), default=began)
    return Latencies(
        throughput=_ratio(sum(len(r.times) for r in good), last - began),
        prompt_rate=_ratio(sum(r.num_inputs for r in good), last_first - began),
        ttft_p50=quantile(first, 0.50),
        ttft_p99=quantile(first, 0.99),
        itl_p50=quantile(between, 0.50),
        itl_p99=quantile(between, 0.99),
        slo=sum(t <= slo_s for t in first) / len(records),
        num_failed=len(records) - len(good),
    )


def quantile(ascending: Sequence[float], q: float) -> float:
    """Linear interpolation between neighbours; NaN of an empty sequence."""
    if not ascending:
        return float("nan")
    position = q * (len(ascending) - 1)
    low = int(position)
    high = min(low + 1, len(ascending) - 1)
    return ascending[low] + (position - low) * (ascending[high] - ascending[low])


@dataclass(frozen=True, slots=True)
class EngineWork:
    """Figures that only an engine in this process gives. In a decode step every row has one token; figures of decode
    steps are taken from those with the most rows.

    adapters_mean, adapters_max   distinct adapters in a step
    decode_s, decode_lora_bytes   median seconds; mean bytes of the distinct adapters
    stalled         share of the time in which requests waited for adapters and nothing could be computed
    loading         seconds of all loads per second of the pass; the part above `stalled` overlapped with computation
    load_s          mean seconds of a load
    num_residents   adapters in the pool at the end
    """

    num_steps: int
    adapters_mean: float
    adapters_max: int
    decode_rows: int
    decode_s: float
    decode_lora_bytes: float
    stalled: float
    loading: float
    pool_hits: float
    host_hits: float
    misses: float
    loaded_bytes: int
    load_s: float
    placed_bytes: int
    num_residents: int
    num_preemptions: int


def engine_work(steps: Sequence[EngineStep], placed_bytes: int, before: EngineStats, after: EngineStats) -> EngineWork:
    """The work between the stats `before` and `after`."""
    busy = [s for s in steps if s.num_tokens]
    decode = [s for s in busy if s.is_decode]
    rows = max((s.num_rows for s in decode), default=0)
    full = [s for s in decode if s.num_rows == rows]
    stalled = sum(b.began - a.began for a, b in itertools.pairwise(steps) if not a.num_tokens and a.num_waiting)
    elapsed = steps[-1].began + steps[-1].seconds - steps[0].began if steps else 0.0

    def more(field: str) -> int:
        return int(getattr(after, field) - getattr(before, field))

    hits = [more(f) for f in ("num_pool_hits", "num_host_hits", "num_misses")]
    pool, host, miss = (_ratio(n, sum(hits)) for n in hits)
    return EngineWork(
        num_steps=len(busy),
        adapters_mean=statistics.fmean(s.num_adapters for s in busy) if busy else 0.0,
        adapters_max=max((s.num_adapters for s in busy), default=0),
        decode_rows=rows,
        decode_s=statistics.median(s.seconds for s in full) if full else float("nan"),
        decode_lora_bytes=statistics.fmean(s.adapter_bytes for s in full) if full else 0.0,
        stalled=_ratio(stalled, elapsed),
        loading=_ratio(after.load_seconds.sum - before.load_seconds.sum, elapsed),
        pool_hits=pool,
        host_hits=host,
        misses=miss,
        loaded_bytes=more("num_loaded_bytes"),
        load_s=_ratio(after.load_seconds.sum - before.load_seconds.sum, more("num_loads")),
        placed_bytes=placed_bytes,
        num_residents=len(after.adapters_in_pool),
        num_preemptions=more("num_preemptions"),
    )


@dataclass(frozen=True, slots=True)
class Row:
    """One case on one system: medians over its passes. A figure that is not known is NaN.

    spread       lowest and highest throughput of a pass
    step_ratio   seconds of a decode step ÷ its floor
    ceiling      throughput ÷ the highest that the floors allow (closed loops)
    bandwidth    share of the memory bandwidth that a decode step uses for weights and adapters
    cpu_ms       ms of a core for each output token, by what processes do
    idle_cores   what the system uses of the processor when it has nothing to do
    """

    case: str
    system: str
    latencies: Latencies
    spread: tuple[float, float]
    work: EngineWork | None
    peak_bytes: int
    load_before: float
    start_s: float
    step_ratio: float = float("nan")
    ceiling: float = float("nan")
    bandwidth: float = float("nan")
    cpu_ms: Mapping[str, float] = field(default_factory=dict)
    idle_cores: float = float("nan")

    def with_floors(
        self,
        model: ModelSize,
        machine: MachineRates,
        requests: Sequence[tuple[int, int]],
        at_once: int | None,
        lora_bytes: float,
    ) -> Row:
        """The row with its ratios to the floors. `requests`: (prompt, output) tokens. `lora_bytes`: of a full decode
        step.
        """
        step, ceiling, bandwidth = (float("nan"),) * 3
        if self.work is not None and self.work.decode_rows:
            w = self.work
            step = w.decode_s / decode_step_seconds(model, machine, w.decode_rows, w.decode_lora_bytes)
            bandwidth = (model.nbytes + w.decode_lora_bytes) / w.decode_s / machine.bandwidth
        if at_once is not None:
            most = most_tokens_per_second(model, machine, requests, at_once, lora_bytes)
            ceiling = self.latencies.throughput / most
        return replace(self, step_ratio=step, ceiling=ceiling, bandwidth=bandwidth)


def median_row(
    case: str,
    system: str,
    passes: Sequence[tuple[Latencies, EngineWork | None]],
    *,
    peak_bytes: int,
    load_before: float,
    start_s: float,
) -> Row:
    """Each latency is its median over the passes; the engine's work is that of the pass with the median throughput."""
    found = [latency for latency, _ in passes]
    middle = sorted(passes, key=lambda p: p[0].throughput)[(len(passes) - 1) // 2]

    def mid(field: str) -> float:
        return float(statistics.median(getattr(latency, field) for latency in found))

    names = ("throughput", "prompt_rate", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "slo")
    medians = Latencies(**{name: mid(name) for name in names}, num_failed=sum(f.num_failed for f in found))
    work = middle[1]
    if work is not None:
        steps = [w.decode_s for _, w in passes if w is not None and w.decode_rows == work.decode_rows]
        work = replace(work, decode_s=statistics.median(steps)) if steps else work
    rates = [f.throughput for f in found]
    return Row(case, system, medians, (min(rates), max(rates)), work, peak_bytes, load_before, start_s)


def differing(alone: Sequence[Record], batched: Sequence[Record]) -> float:
    """Share of requests whose tokens differ between two passes of the same requests."""
    pairs = list(zip(alone, batched, strict=True))
    return sum(a.ids != b.ids for a, b in pairs) / len(pairs)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
