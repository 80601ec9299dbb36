"""Which decode steps are captured before the first request, within which limits, and what serves the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loray.bases.registry import BaseModel
from loray_kernels import CaptureBarrier, CapturedStep, CaptureLimits, CaptureState, Decoding, KvLayout, Parts
from loray_kernels.cuda import graphs
from loray_kernels.cuda.graphs import Capture, DecodeGraphs, GraphShape
from tests.fixtures.engines import Spy, make_engine, request, run
from tests.kernels.cuda.shim_ops import ShimOps, use_three_forms


class Counting:
    """A Capturer that captures nothing; captures share ten bytes for each row of the largest, and have one each."""

    def __init__(self, memory: int = 1 << 40) -> None:
        self.shared = self.num = self.num_released = 0
        self._memory = memory

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Capture]:
        return lambda: self._capture(run())

    def _capture(self, out: Tensor) -> Capture:
        shared = max(self.shared, 10 * len(out))
        if shared + self.num + 1 > self._memory:
            raise torch.OutOfMemoryError
        self.shared, self.num = shared, self.num + 1
        return Capture(lambda: None, out)

    def num_bytes(self) -> int:
        return self.shared + self.num

    def release(self) -> None:
        self.shared = self.num = 0
        self.num_released += 1


def decode_graphs(capturer: Counting, agree: Callable[[bool], bool] = bool) -> DecodeGraphs:
    layout = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=2, head_dim=16)

    def forward(step: CapturedStep) -> Tensor:
        return step.token_ids_S[:, None].expand(-1, 5).float()

    decoding = Decoding(layout, 9, 40, (), torch.device("cpu"), CaptureBarrier(agree=agree))
    return DecodeGraphs(forward, decoding, capturer)


def capture(
    steps: DecodeGraphs, seconds: float = 1e9, num_bytes: int = 1 << 40
) -> tuple[CaptureState, list[CaptureState]]:
    progress: list[CaptureState] = []
    return steps.capture(CaptureLimits(seconds, num_bytes), progress.append), progress


ALL, LORA, NONE = graphs.KINDS[-1], Parts.LORA, Parts.NONE


def test_all_sizes_and_kinds_that_requests_can_have_are_captured() -> None:
    steps = decode_graphs(Counting())  # nine requests
    done, progress = capture(steps)
    shapes = list(steps._captured)
    assert shapes == list(steps.shapes())
    assert {f.size for f in shapes} == {1, 2, 4, 8, 16}
    assert {f.kind for f in shapes} == set(graphs.KINDS)
    assert [p.num_captured for p in progress] == list(range(1, len(shapes) + 1))
    assert done == progress[-1]
    assert (done.num_captured, done.num_wanted, done.num_bytes) == (30, 30, 160 + 30)


def test_what_serves_all_steps_is_captured_first() -> None:
    """Then what serves some adapters better; large ones first."""
    shapes = list(decode_graphs(Counting()).shapes())
    sizes = (16, 8, 4, 2, 1)
    assert shapes[:15] == [GraphShape(size, kind) for size in sizes for kind in (ALL, LORA, NONE)]
    assert {f.kind for f in shapes[15:]} == set(graphs.KINDS) - {ALL, LORA, NONE}
    assert len(set(shapes)) == 30


def test_results_of_all_captures_are_in_one_tensor() -> None:
    steps = decode_graphs(Counting())
    capture(steps)
    assert len({r.out.untyped_storage().data_ptr() for r in steps._captured.values()}) == 1


def test_capturing_ends_at_its_limits() -> None:
    """What captures share is counted once."""
    steps = decode_graphs(Counting())
    done, progress = capture(steps, num_bytes=160 + 20)
    assert (done.num_captured, done.num_bytes) == (20, 160 + 20)
    assert progress[-1] == done
    assert list(steps._captured) == list(steps.shapes())[:20]
    assert capture(decode_graphs(Counting()), seconds=0.0)[0].num_captured == 0
    assert capture(decode_graphs(Counting()), num_bytes=0)[0].num_captured == 0


@pytest.mark.parametrize(("memory", "num_bytes"), [(1 << 40, 95), (95, 1 << 40)])
def test_where_the_largest_steps_do_not_fit_smaller_ones_are_captured(memory: int, num_bytes: int) -> None:
    capturer = Counting(memory)
    steps = decode_graphs(capturer)
    done, _ = capture(steps, num_bytes=num_bytes)
    assert capturer.num_released == 1
    assert (done.num_captured, done.num_bytes) == (15, 95)
    assert list(steps._captured) == [f for f in steps.shapes() if f.size <= 8][:15]
    assert steps._out_SV is not None
    assert len(steps._out_SV) == 8  # nothing is left of the larger ones
    for kind in graphs.KINDS:
        assert steps._serving_of(GraphShape(8, kind)) is not None
        assert steps._serving_of(GraphShape(16, kind)) is None


@pytest.mark.parametrize("captured", [True, False])
def test_a_shape_for_which_another_rank_has_no_memory_is_dropped(captured: bool) -> None:
    """This one has enough for all. The other one lacks it for the capture, or for the run before."""
    answers = iter([True, True, True, True, *[True] * captured, False])  # the first shape has three, then the second

    def agree(holds: bool) -> bool:
        return holds and next(answers, True)

    steps = decode_graphs(Counting(), agree)
    capture(steps)
    assert list(steps._captured) == [GraphShape(16, ALL), *(f for f in steps.shapes() if f.size <= 8)]


def test_capturing_ends_where_another_rank_has_no_time() -> None:
    answers = iter([True, True, True, False])
    steps = decode_graphs(Counting(), lambda holds: holds and next(answers))
    assert capture(steps)[0].num_captured == 1
    assert next(answers, None) is None


def test_capturing_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr(graphs.time, "monotonic", lambda: next(now))  # a second at each look, before a shape and after
    assert capture(decode_graphs(Counting()), seconds=10.0)[0].num_captured == 5


def test_a_step_is_served_by_the_next_larger_capture_of_its_kind_or_of_one_with_more_parts() -> None:
    steps = decode_graphs(Counting())
    capture(steps, num_bytes=160 + 17)  # for everything, LoRA and the base all sizes; for two kinds more 16 rows
    assert steps._serving_of(GraphShape(1, NONE)) == GraphShape(1, NONE)
    assert steps._serving_of(GraphShape(16, LORA)) == GraphShape(16, LORA)
    assert steps._serving_of(GraphShape(4, Parts.VERA)) == GraphShape(4, ALL)
    assert steps._serving_of(GraphShape(16, Parts.LORA | Parts.OWN)) == GraphShape(16, Parts.LORA | Parts.OWN)
    assert steps._serving_of(GraphShape(8, Parts.LORA | Parts.OWN)) == GraphShape(16, Parts.LORA | Parts.OWN)
    one = decode_graphs(Counting())
    capture(one, num_bytes=160 + 1)
    assert {one._serving_of(f) for f in one.shapes()} == {GraphShape(16, ALL)}
    nothing = decode_graphs(Counting())
    capture(nothing, seconds=0.0)
    assert nothing._serving_of(GraphShape(1, NONE)) is None


@pytest.fixture(scope="session")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base("Qwen3ForCausalLM")


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> ShimOps:
    return use_three_forms(monkeypatch)


def test_an_engine_captures_before_its_first_request_and_never_later(
    base: BaseModel, ops: ShimOps, caplog: pytest.LogCaptureFixture
) -> None:
    """Where all is captured, where only the largest size is, and where nothing is."""
    requests = [request(str(i), range(3, 9 + i), max_tokens=3 + i) for i in range(3)]
    limits: list[tuple[dict[str, Any], int, list[int]]] = [
        ({}, 3, [4, 4, 2, 1]),
        ({"graph_bytes": 1}, 1, [4, 4, 4, 4]),
        ({"graph_record_s": 0.0}, 0, []),
    ]
    results = []
    for own, num_captured, replayed in limits:
        ops.may_capture, ops.replayed = True, []
        caplog.clear()
        with caplog.at_level("INFO"):
            engine = make_engine(base, **({"max_num_seqs": 4, "graph_record_s": 1e9} | own))
        assert f"recorded decode steps: {num_captured} of 3" in caplog.text
        assert ("are not recorded" in caplog.text) == (num_captured < 3)
        assert not engine.scheduler.step_time.is_known
        assert engine.stats().num_steps == 0
        ops.may_capture = False
        spy = Spy(engine)
        tokens = run(engine, requests)
        assert ops.replayed == replayed
        results.append((tokens, {name: torch.stack(rows) for name, rows in spy.logits.items()}))
    for tokens, logits in results[1:]:
        assert tokens == results[0][0]
        for name, want in results[0][1].items():
            torch.testing.assert_close(logits[name], want, atol=1e-5, rtol=1e-5)
