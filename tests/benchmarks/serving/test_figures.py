"""The figures of the benchmark of serving: latencies, the engine's work, floors, targets."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from benchmarks.machine import MachineRates
from benchmarks.serving.figures import report
from benchmarks.serving.figures.floors import (
    ModelSize,
    decode_step_seconds,
    most_tokens_per_second,
    prompt_seconds,
)
from benchmarks.serving.figures.picture import ONCE, UNIFORM, draw_density
from benchmarks.serving.figures.results import Results
from benchmarks.serving.figures.rows import (
    EngineWork,
    Latencies,
    Row,
    differing,
    engine_work,
    latencies,
    median_row,
    quantile,
)
from benchmarks.serving.figures.targets import verdicts
from benchmarks.serving.models import RANDOM
from benchmarks.serving.recorder import EngineStep
from benchmarks.serving.replay import Record, replay
from benchmarks.serving.workload import TimedRequest

MODEL = ModelSize(layer_weights=100, head_weights=20)
MACHINE = MachineRates(bandwidth=1000.0, flops=4000.0)


def test_latencies_by_hand() -> None:
    records = [
        Record(0.0, 0, 10, times=[1.0, 1.5, 3.0], ids=[1, 2, 3]),
        Record(0.5, 1, 6, times=[2.5, 3.5], ids=[4, 5]),
        Record(1.0, 2, 5, error="IntegrityError: broken"),
    ]
    found = latencies(records, slo_s=1.5)
    assert found.throughput == pytest.approx(5 / 3.5)
    assert found.prompt_rate == pytest.approx(16 / 2.5)
    assert (found.ttft_p50, found.ttft_p99) == pytest.approx((1.5, 1.99))
    assert found.itl_p50 == pytest.approx(1.0)
    assert found.slo == pytest.approx(1 / 3)
    assert found.num_failed == 1


def test_quantiles_lie_between_neighbours() -> None:
    assert quantile([1.0, 2.0, 4.0], 0.75) == 3.0
    assert quantile([7.0], 0.99) == 7.0
    assert math.isnan(quantile([], 0.5))


class _Stats:
    """The fields of EngineStats that `engine_work` reads."""

    def __init__(self, scale: int) -> None:
        self.num_pool_hits, self.num_host_hits, self.num_misses = 6 * scale, 3 * scale, scale
        self.num_loaded_bytes, self.num_preemptions = 100 * scale, scale
        self.num_loads, self.adapters_in_pool = 4 * scale, ("a",) * 3 * scale
        self.load_seconds = self
        self.sum = 0.5 * scale


def test_engine_work_by_hand() -> None:
    steps = [
        EngineStep(0.0, 1.0, num_tokens=8, num_rows=2, num_adapters=2, adapter_bytes=30, num_waiting=0),
        EngineStep(1.0, 0.2, num_tokens=2, num_rows=2, num_adapters=2, adapter_bytes=30, num_waiting=0),
        EngineStep(1.2, 0.4, num_tokens=2, num_rows=2, num_adapters=1, adapter_bytes=10, num_waiting=0),
        EngineStep(1.6, 0.1, num_tokens=1, num_rows=1, num_adapters=1, adapter_bytes=10, num_waiting=1),
        EngineStep(1.8, 0.0, num_tokens=0, num_rows=0, num_adapters=0, adapter_bytes=0, num_waiting=1),
        EngineStep(2.3, 0.2, num_tokens=5, num_rows=1, num_adapters=1, adapter_bytes=20, num_waiting=0),
    ]
    work = engine_work(steps, 70, _Stats(1), _Stats(2))  # type: ignore[arg-type]
    assert (work.num_steps, work.adapters_max) == (5, 2)
    assert work.adapters_mean == pytest.approx(7 / 5)
    assert (work.decode_rows, work.decode_s, work.decode_lora_bytes) == (2, pytest.approx(0.3), 20)
    assert work.stalled == pytest.approx(0.5 / 2.5)
    assert work.loading == pytest.approx(0.5 / 2.5)
    assert (work.pool_hits, work.host_hits, work.misses) == (0.6, 0.3, 0.1)
    assert (work.loaded_bytes, work.placed_bytes, work.num_preemptions) == (100, 70, 1)
    assert (work.load_s, work.num_residents) == (0.125, 6)


def test_the_floor_is_memory_for_few_rows_and_arithmetic_for_many() -> None:
    """120 weights of 2 bytes, 1000 bytes/s: 0.24 s; 240 FLOPs a row, 4000 FLOP/s: 0.06 s a row."""
    assert MODEL.nbytes == 240
    assert decode_step_seconds(MODEL, MACHINE, 1) == pytest.approx(0.24)
    assert decode_step_seconds(MODEL, MACHINE, 8) == pytest.approx(0.48)
    assert decode_step_seconds(MODEL, MACHINE, 8, lora_bytes=100) == pytest.approx(0.58)
    assert prompt_seconds(MODEL, MACHINE, 50, num_prompts=3) == pytest.approx((50 * 200 + 3 * 40) / 4000)
    assert decode_step_seconds(MODEL.with_shared(40), MACHINE, 8) == pytest.approx(0.64)


def test_the_ceiling_is_prompts_and_then_full_steps() -> None:
    requests = [(10, 5)] * 4  # two at once: 16 tokens beyond the first ones, in 8 steps of 0.24 s
    prompts = (40 * 200 + 4 * 40) / 4000
    most = most_tokens_per_second(MODEL, MACHINE, requests, at_once=2)
    assert most == pytest.approx(20 / (prompts + 8 * 0.24))


def test_sizes_are_those_of_the_configuration() -> None:
    size = ModelSize.of(RANDOM["llama3-8b-random"])
    assert size.layer_weights + size.head_weights == 8_030_261_248 - 128256 * 4096 - 65 * 4096


def _row(case: str, throughput: float, system: str = "loray", **work: float) -> Row:
    fields = dict.fromkeys(EngineWork.__dataclass_fields__, 0) | {"decode_rows": 4, "decode_s": 0.5} | work
    own = EngineWork(**fields) if system == "loray" else None  # type: ignore[arg-type]
    figures = Latencies(throughput, 100.0, 0.1, 0.2, 0.01, 0.02, 1.0, 0)
    return median_row(case, system, [(figures, own)], peak_bytes=1000, load_before=0.5, start_s=1.0)


def test_rows_are_medians_beside_their_floors() -> None:
    work = _row("x", 1.0).work
    passes = [(Latencies(t, 1.0, 0.1, 0.2, 0.3, 0.4, 1.0, 0), work) for t in (30.0, 10.0, 20.0)]
    row = median_row("x", "loray", passes, peak_bytes=1, load_before=0.0, start_s=0.0)
    assert row.latencies.throughput == 20.0
    assert row.spread == (10.0, 30.0)
    beside = row.with_floors(MODEL, MACHINE, [(10, 5)] * 4, 2, 0.0)
    assert beside.step_ratio == pytest.approx(0.5 / 0.24)
    assert beside.ceiling == pytest.approx(20.0 / most_tokens_per_second(MODEL, MACHINE, [(10, 5)] * 4, 2))
    assert math.isnan(row.with_floors(MODEL, MACHINE, [(10, 5)], None, 0.0).ceiling)
    assert beside.bandwidth == pytest.approx(240 / 0.5 / 1000)


def test_targets_compare_with_the_peer_of_this_run_or_the_recorded_one() -> None:
    results = Results({}, MACHINE, MODEL)
    for row in (_row("base", 440.0), _row("n=32", 330.0, decode_s=0.6, decode_lora_bytes=80.0)):
        results.rows[row.case, row.system] = row
    by_name = {v.name: v for v in verdicts(results)}
    base = by_name["base: tokens/s by vllm's"]
    assert (base.reached, base.recorded, base.is_met) == (pytest.approx(440 / 393), True, True)
    part = by_name["n=32: LoRA's part of a decode step by its bytes ÷ bandwidth"]
    assert (part.reached, part.is_met) == (pytest.approx(0.1 / 0.08), True)
    assert not by_name["n=32: tokens/s by base's"].is_met
    results.rows["base", "vllm"] = _row("base", 600.0, "vllm")
    base = {v.name: v for v in verdicts(results)}["base: tokens/s by vllm's"]
    assert (base.reached, base.recorded, base.is_met) == (pytest.approx(440 / 600), False, False)
    assert "MISSED" in report.summary(results, verdicts(results))


def test_isolation_counts_requests_whose_tokens_differ() -> None:
    alone = [Record(0, 0, 1, ids=[1, 2]), Record(0, 0, 1, ids=[3, 4])]
    batched = [Record(0, 0, 1, ids=[1, 2]), Record(0, 0, 1, ids=[3, 5])]
    assert differing(alone, batched) == 0.5
    results = Results({}, MACHINE, MODEL)
    results.records = {("base alone", "loray"): alone, ("base batched", "loray"): batched}
    assert results.isolation() == [("base", "loray", 0.5)]
    assert results.agreement() == []
    results.records["base alone", "peft"] = [Record(0, 0, 1, ids=[1, 3]), Record(0, 0, 1, ids=[4, 4])]
    assert results.agreement() == [("base alone", "peft", 0.5)]


def test_the_density_picture_has_a_panel_for_each_figure(tmp_path: Path) -> None:
    results = Results({}, MACHINE, MODEL)
    with pytest.raises(ValueError, match="--preset density"):
        draw_density(results, tmp_path / "none.svg")
    for name, rate in (("LoRA r16", 100.0), ("VeRA r256", 300.0)):
        for suffix in (ONCE, UNIFORM):
            row = _row(name + suffix, rate)
            results.rows[row.case, row.system] = row
    draw_density(results, tmp_path / "density.svg")
    titles = re.findall("<!-- (.*?) -->", (tmp_path / "density.svg").read_text())
    assert {"adapters in the pool", "tokens/s", "LoRA r16", "VeRA r256", "300"} <= set(titles)


def test_a_closed_loop_never_exceeds_its_width_and_keeps_errors_apart() -> None:
    under_way, most = 0, 0

    async def submit(index: int, request: TimedRequest) -> AsyncIterator[list[int]]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for token in range(request.max_tokens):
            await asyncio.sleep(0)
            yield [token]
        under_way -= 1
        if index == 3:
            raise RuntimeError("broken")

    requests = [TimedRequest(0.0, None, (1, 2), 2 + i) for i in range(6)]
    records = asyncio.run(replay(requests, 2, submit))
    assert most == 2
    assert [len(r.times) for r in records] == [2, 3, 4, 5, 6, 7]
    assert [r.error for r in records] == [None] * 3 + ["RuntimeError: broken"] + [None] * 2
    assert all(r.times == sorted(r.times) and r.sent <= r.times[0] for r in records)


def test_an_open_loop_counts_from_when_a_request_was_due() -> None:
    async def submit(index: int, request: TimedRequest) -> AsyncIterator[list[int]]:
        yield [index]

    records = asyncio.run(replay([TimedRequest(at, None, (1,), 1) for at in (0.0, 0.02)], None, submit))
    assert [r.sent for r in records] == [0.0, 0.02]
    assert records[1].times[0] >= 0.02
