"""What recording decode steps takes of a card: cuBLAS keeps a workspace for each stream on which it has computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from loray_kernels import CaptureBarrier, CapturedStep, CaptureLimits, Decoding, KvLayout
from loray_kernels.cuda.graphs import DecodeGraphs, GraphCapturer

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
