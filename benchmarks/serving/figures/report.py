"""The printed table and its summary. docs/benchmarks/serving.md explains the columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from benchmarks.serving.figures import served
from benchmarks.serving.figures.results import Results
from benchmarks.serving.figures.rows import Row
from benchmarks.serving.figures.targets import Verdict

_COLUMNS: tuple[tuple[str, int, Callable[[Row], str]], ...] = (
    ("case", 26, lambda r: r.case),
    ("system", 12, lambda r: r.system),
    ("tok/s", 7, lambda r: _number(r.latencies.throughput, 1)),
    ("min–max", 13, lambda r: f"{r.spread[0]:.1f}–{r.spread[1]:.1f}"),
    ("TTFT p50", 8, lambda r: _number(r.latencies.ttft_p50 * 1e3)),
    ("p99 ms", 6, lambda r: _number(r.latencies.ttft_p99 * 1e3)),
    ("ITL p50", 7, lambda r: _number(r.latencies.itl_p50 * 1e3, 1)),
    ("p99 ms", 6, lambda r: _number(r.latencies.itl_p99 * 1e3, 1)),
    ("SLO", 6, lambda r: f"{r.latencies.slo:.1%}"),
    ("pool/host/miss %", 16, lambda r: _hits(r)),
    ("in pool", 7, lambda r: "" if r.work is None else str(r.work.num_residents)),
    ("load ms", 7, lambda r: "" if r.work is None or not r.work.load_s else _number(r.work.load_s * 1e3, 1)),
    ("load MB", 7, lambda r: "" if r.work is None else _number(r.work.loaded_bytes / 1e6)),
    ("place MB", 8, lambda r: "" if r.work is None else _number(r.work.placed_bytes / 1e6)),
    ("adapters/step", 13, lambda r: "" if r.work is None else f"{r.work.adapters_mean:.1f} ≤{r.work.adapters_max}"),
    ("stall", 5, lambda r: "" if r.work is None else f"{r.work.stalled:.1%}"),
    ("loading", 7, lambda r: "" if r.work is None else f"{r.work.loading:.2f}"),
    ("step ms", 7, lambda r: "" if r.work is None else _number(r.work.decode_s * 1e3, 1)),
    ("×floor", 6, lambda r: _number(r.step_ratio, 2)),
    ("bandw.", 6, lambda r: "" if math.isnan(r.bandwidth) else f"{r.bandwidth:.0%}"),
    ("of max", 6, lambda r: "" if math.isnan(r.ceiling) else f"{r.ceiling:.0%}"),
    ("peak MB", 7, lambda r: _number(r.peak_bytes / 1e6) if r.peak_bytes else ""),
    ("load", 5, lambda r: f"{r.load_before:.2f}"),
)


def header() -> str:
    return _line([name for name, _, _ in _COLUMNS])


def line(row: Row) -> str:
    text = _line([show(row) for _, _, show in _COLUMNS])
    return text + (f"  {row.latencies.num_failed} FAILED" if row.latencies.num_failed else "")


def summary(results: Results, verdicts: Sequence[Verdict]) -> str:
    """The lines below the table: isolation, agreement with peers, raw transfer, targets."""
    lines = [
        f"{label}, {system}: tokens of {share:.0%} of the requests differ between alone and batched"
        for label, system, share in results.isolation()
    ]
    lines += [
        f"{case}, {system}: first token of {share:.0%} of the requests is ours"
        for case, system, share in results.agreement()
    ]
    if not math.isnan(results.transfer_s):
        lines.append(f"raw transfer of an adapter from the store: {results.transfer_s * 1e3:.1f} ms")
    lines += served.lines(results)
    if verdicts:
        lines += ["", f"{'target':<72} {'':>8} {'reached':>8} {'at floor':>9}"]
    for v in verdicts:
        floor = "" if v.floor is None else f"{v.floor:.2f}"
        note = "" if v.is_met else "MISSED"
        note += " (peer's recorded figure)" if v.recorded else ""
        lines.append(f"{v.name:<72} {v.sign}{v.target:>7.2f} {v.reached:>8.2f} {floor:>9} {note}".rstrip())
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    (case, first), (system, second) = ((cell, width) for cell, (_, width, _) in zip(cells, _COLUMNS[:2], strict=False))
    numbers = (f"{cell:>{width}}" for cell, (_, width, _) in zip(cells[2:], _COLUMNS[2:], strict=True))
    return " ".join((f"{case:<{first}}", f"{system:<{second}}", *numbers))


def _hits(row: Row) -> str:
    w = row.work
    if w is None or not w.pool_hits + w.host_hits + w.misses:
        return ""
    return f"{w.pool_hits:.0%}/{w.host_hits:.0%}/{w.misses:.0%}"


def _number(value: float, digits: int = 0) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"
