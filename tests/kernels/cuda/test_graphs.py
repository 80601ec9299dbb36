"""Which decode steps are captured before the first request, within which limits, and what serves the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from loray_kernels import CaptureBarrier, CapturedStep, CaptureLimits, CaptureState, Decoding, KvLayout, Parts
from loray_kernels.cuda import graphs
from loray_kernels.cuda.graphs import Capture, DecodeGraphs, GraphCapturer, GraphShape


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


_WORKSPACE, _GRAPH, _CARD = 32 << 20, 2 << 20, 80 << 30


class Stream:
    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


class Card:
    """torch.cuda as recording uses it. `computed_on`: the streams on which something has computed, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.computed_on: list[Stream] = []
        self.num_graphs = 0
        self._current = Stream()
        fakes: dict[str, Callable[..., object]] = {
            "Stream": Stream,
            "stream": self._on,
            "current_stream": lambda device: self._current,
            "CUDAGraph": lambda: self,
            "graph": self._captured,
            "graph_pool_handle": lambda: (0, 1),
            "empty_cache": lambda: None,
            "mem_get_info": lambda device: (_CARD - self._num_used(), _CARD),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def replay(self) -> None:
        pass

    def compute(self) -> None:
        self.computed_on.append(self._current)

    def _num_used(self) -> int:
        return _WORKSPACE * len(set(self.computed_on)) + _GRAPH * self.num_graphs

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    @contextmanager
    def _captured(self, graph: object, stream: Stream | None = None, **options: object) -> Iterator[None]:
        with self._on(stream or Stream()):
            yield
        self.num_graphs += 1


def test_all_forms_are_recorded_on_one_stream_within_the_bytes_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 requests of 8,192 tokens."""
    card = Card(monkeypatch)

    def forward(step: CapturedStep) -> Tensor:
        card.compute()
        return step.token_ids_S[:, None].float()

    layout, device = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=2, head_dim=16), torch.device("cpu")
    steps = DecodeGraphs(forward, Decoding(layout, 32, 512, (), device), GraphCapturer(device, CaptureBarrier()))
    done = steps.capture(CaptureLimits(1e9, 1 << 30), lambda progress: None)
    assert done.num_captured == done.num_wanted == card.num_graphs == 36
    assert len(card.computed_on) == 2 * 36
    assert len(set(card.computed_on)) == 1
