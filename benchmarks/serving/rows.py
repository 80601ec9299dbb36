"""The figures of serving: a row for each case and system, from the times of tokens and engine steps."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from benchmarks.client import UNKNOWN_ID, Answer
from benchmarks.report import Cell, Report, quantile
from benchmarks.serving.cases import BESIDE, OURS, SERVE, UP
from benchmarks.serving.floors import ModelSize, decode_step_seconds, most_tokens_per_second
from benchmarks.serving.workload import OTHER, SAME, STREAM, TimedRequest
from benchmarks.world import MachineRates

_NAN = float("nan")


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


def latencies(requests: Sequence[TimedRequest], answers: Sequence[Answer], slo_s: float) -> Latencies:
    """Latencies of one pass. `slo_s`: seconds within which the first token is in time."""
    good = [(r, a) for r, a in zip(requests, answers, strict=True) if not a.error and a.times]
    began = min(a.at for a in answers)
    first = [a.ttft for _, a in good]
    between = [d - c for _, a in good for c, d in itertools.pairwise(a.times)]
    last = max((a.times[-1] for _, a in good), default=began)
    last_first = max((a.times[0] for _, a in good), default=began)
    return Latencies(
        throughput=ratio(sum(len(a.times) for _, a in good), last - began),
        prompt_rate=ratio(sum(len(r.prompt_ids) for r, _ in good), last_first - began),
        ttft_p50=quantile(first, 0.50),
        ttft_p99=quantile(first, 0.99),
        itl_p50=quantile(between, 0.50),
        itl_p99=quantile(between, 0.99),
        slo=sum(t <= slo_s for t in first) / len(answers),
        num_failed=len(answers) - len(good),
    )


class MixedFigures(NamedTuple):
    """What a long prompt does to others, and they to it, in seconds. NaN where the load has no such request.

    long        from the sending of the long prompt to its first token
    short_same  the largest time to the first token of a short prompt of the same tenant that came before the long one's
                first token; short_other: of another tenant; short_p50: the median of both
    gap         the longest time between two tokens of the stream from the sending of the long prompt on
    """

    long: float
    short_same: float
    short_other: float
    short_p50: float
    gap: float


def mixed_figures(requests: Sequence[TimedRequest], answers: Sequence[Answer]) -> MixedFigures | None:
    """None if a request failed: its figures would be those of another load."""
    if any(answer.error or not answer.times for answer in answers):
        return None
    pairs = list(zip(requests, answers, strict=True))
    long = max(pairs, key=lambda pair: len(pair[0].prompt_ids))[1]
    first: dict[str, list[float]] = {SAME: [], OTHER: []}
    gaps = []
    for request, answer in pairs:
        if request.tenant == STREAM:
            gaps += [b - a for a, b in itertools.pairwise(answer.times) if b > long.at]
        elif answer is not long and answer.at < long.times[0]:
            first[request.tenant].append(answer.ttft)
    same, other = (max(first[tenant], default=_NAN) for tenant in (SAME, OTHER))
    middle = quantile([*first[SAME], *first[OTHER]], 0.5)
    return MixedFigures(long.ttft, same, other, middle, max(gaps, default=_NAN))


@dataclass(frozen=True, slots=True)
class EngineWork:
    """Figures that only an engine in process gives. In a decode step every row has one token; figures of decode steps
    are taken from those with the most rows.

    decode_s, decode_lora_bytes   median seconds; mean bytes of the distinct adapters
    stalled         share of the time in which requests waited for adapters and nothing could be computed
    load_s          mean seconds of a load
    num_residents   adapters in the pool at the end
    """

    decode_rows: int
    decode_s: float
    decode_lora_bytes: float
    stalled: float
    pool_hits: float
    host_hits: float
    misses: float
    loaded_bytes: int
    load_s: float
    num_residents: int


@dataclass(frozen=True, slots=True)
class Row:
    """One case on one system: medians over its passes. A figure that is not known is NaN.

    spread       lowest and highest throughput of a pass
    step_ratio   seconds of a decode step ÷ its floor
    ceiling      throughput ÷ the highest that the floors allow (closed loops)
    cpu_ms       ms of a core for each output token
    idle_cores   what the system uses of the processor when it has nothing to do
    """

    case: str
    system: str
    latencies: Latencies
    spread: tuple[float, float]
    work: EngineWork | None
    peak_bytes: int
    load_before: float
    step_ratio: float = _NAN
    ceiling: float = _NAN
    cpu_ms: float = _NAN
    idle_cores: float = _NAN

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
        step, ceiling = _NAN, _NAN
        if (w := self.work) is not None and w.decode_rows:
            step = w.decode_s / decode_step_seconds(model, machine, w.decode_rows, w.decode_lora_bytes)
        if at_once is not None:
            most = most_tokens_per_second(model, machine, requests, at_once, lora_bytes)
            ceiling = self.latencies.throughput / most
        return replace(self, step_ratio=step, ceiling=ceiling)


def median_row(
    case: str,
    system: str,
    passes: Sequence[tuple[Latencies, EngineWork | None]],
    peak_bytes: int,
    load_before: float,
) -> Row:
    """Each latency is its median over the passes; the engine's work is that of the pass with the median throughput."""
    found = [latency for latency, _ in passes]
    work = sorted(passes, key=lambda p: p[0].throughput)[(len(passes) - 1) // 2][1]
    medians = {
        name: statistics.median(getattr(latency, name) for latency in found)
        for name in ("throughput", "prompt_rate", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "slo")
    }
    if work is not None:
        steps = [w.decode_s for _, w in passes if w is not None and w.decode_rows == work.decode_rows]
        work = replace(work, decode_s=statistics.median(steps))
    rates, failed = [f.throughput for f in found], sum(f.num_failed for f in found)
    middle = Latencies(**medians, num_failed=failed)
    return Row(case, system, middle, (min(rates), max(rates)), work, peak_bytes, load_before)


@dataclass(slots=True)
class Results:
    """All rows of a run. `answers`: those of each row's first pass. `mixed`: medians over the passes of a case with a
    long prompt.
    """

    rates: MachineRates
    model: ModelSize
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)
    answers: dict[tuple[str, str], Sequence[Answer]] = field(default_factory=dict)
    mixed: dict[tuple[str, str], MixedFigures] = field(default_factory=dict)

    def get(self, case: str, system: str = OURS) -> Row | None:
        return self.rows.get((case, system))

    def agreement(self) -> list[tuple[str, str, float]]:
        """(case, peer, share of requests with the same first token as loray's). A low share says that the peer computes
        other models.
        """
        return [
            (case, system, sum(a.ids[:1] == b.ids[:1] for a, b in zip(ours, theirs, strict=True)) / len(ours))
            for (case, system), theirs in self.answers.items()
            if system != OURS
            and (ours := self.answers.get((case, OURS)))
            and theirs[0].ids[:1] not in ([UNKNOWN_ID], [])
        ]

    def report(self, machine: Mapping[str, str], arguments: str, **more: Any) -> Report:
        rows = list(self.rows.values())
        figures = {
            "bandwidth": self.rates.bandwidth,
            "flops": self.rates.flops,
            "rows": [asdict(row) for row in rows],
            "mixed": [{"case": c, "system": s} | m._asdict() for (c, s), m in self.mixed.items()],
            "first_tokens_as_ours": [{"case": c, "system": s, "share": share} for c, s, share in self.agreement()],
        }
        cells = [[show(row) for _, show in _COLUMNS] for row in rows]
        return Report(machine, [name for name, _ in _COLUMNS], cells, arguments, figures | more)


def _work(show: Callable[[EngineWork], Cell]) -> Callable[[Row], Cell]:
    return lambda row: None if row.work is None else show(row.work)


def _hits(w: EngineWork) -> Cell:
    return f"{w.pool_hits:.0%}/{w.host_hits:.0%}/{w.misses:.0%}" if w.pool_hits + w.host_hits + w.misses else None


_COLUMNS: tuple[tuple[str, Callable[[Row], Cell]], ...] = (
    ("case", lambda r: r.case),
    ("system", lambda r: r.system),
    ("tok/s\t.1f", lambda r: r.latencies.throughput),
    ("min–max", lambda r: f"{r.spread[0]:.1f}–{r.spread[1]:.1f}"),
    ("TTFT p50 ms\t.0f", lambda r: r.latencies.ttft_p50 * 1e3),
    ("p99\t.0f", lambda r: r.latencies.ttft_p99 * 1e3),
    ("ITL p50 ms\t.1f", lambda r: r.latencies.itl_p50 * 1e3),
    ("p99\t.1f", lambda r: r.latencies.itl_p99 * 1e3),
    ("SLO\t.1%", lambda r: r.latencies.slo),
    ("failed", lambda r: r.latencies.num_failed or None),
    ("pool/host/miss %", _work(_hits)),
    ("in pool", _work(lambda w: w.num_residents)),
    ("load ms\t.1f", _work(lambda w: w.load_s * 1e3 or None)),
    ("load MB\t.0f", _work(lambda w: w.loaded_bytes / 1e6)),
    ("stall\t.1%", _work(lambda w: w.stalled)),
    ("step ms\t.1f", _work(lambda w: w.decode_s * 1e3)),
    ("×floor\t.2f", lambda r: r.step_ratio),
    ("of max\t.0%", lambda r: r.ceiling),
    ("core ms/token\t.2f", lambda r: r.cpu_ms),
    ("peak MB\t.0f", lambda r: r.peak_bytes / 1e6 or None),
    ("load\t.2f", lambda r: r.load_before),
)


def summary(results: Results) -> Iterator[str]:
    """The lines below the table: first tokens as a peer's, what is left over HTTP, idle cores, mixed loads."""
    for case, system, share in results.agreement():
        yield f"{case}, {system}: first token of {share:.0%} of the requests is ours"
    for case in dict.fromkeys(case for case, system in results.rows if system in (BESIDE, SERVE, UP)):
        rates = {s: row.latencies.throughput for (c, s), row in results.rows.items() if c == case}
        for system, rate in rates.items():
            others = [other for other in (OURS, BESIDE, "vllm") if other in rates and other != system]
            shares = ", ".join(f"{rate / rates[other]:.2f} of {other}" for other in others)
            yield f"{case}: {system} {rate:.1f} tok/s" + (f" ({shares})" if shares else "")
    idle = {system: row.idle_cores for (_, system), row in results.rows.items() if row.idle_cores == row.idle_cores}
    yield from (f"{system}: {cores:.3f} cores when idle" for system, cores in idle.items())
    for (case, system), m in results.mixed.items():
        text = f"{case}, {system}: first token of the long prompt after {m.long:.2f} s"
        if m.gap == m.gap:
            text += (
                f"; of short ones after at most {m.short_same:.2f} s (its tenant) and {m.short_other:.2f} s (another), "
                f"median {m.short_p50:.2f} s; longest gap of a stream {m.gap * 1e3:.0f} ms"
            )
        yield text


def ratio(part: float, whole: float) -> float:
    """0 where there is no whole."""
    return part / whole if whole else 0.0
