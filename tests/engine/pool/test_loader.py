"""When a load gives its result: on a GPU only when the adapter is complete."""

from __future__ import annotations

from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loray.engine.memory.partial import PartialLoad
from loray.engine.pool.loader import AdapterLoads, LoadProgress
from loray.engine.pool.packed import PackedAdapter, Packer, Packing
from tests.fixtures.packing import packer, weights
from tests.fixtures.peft_adapters import Adapters


class Slow:
    """All but the last layer are there at once; the rest comes when `go` is set."""

    def __init__(self) -> None:
        self.half, self.go = Event(), Event()

    def pack(self, packer: Packer, progress: LoadProgress) -> PackedAdapter:
        partial = PartialLoad()
        packing = Packing(packer, weights(dict.fromkeys(range(4), 2)), partial)
        packing.take(range(3))
        partial.advance(3)
        progress(packing.packed, 0.0)
        self.half.set()
        assert self.go.wait(60)
        packing.take([3])
        partial.finish()
        return packing.packed


@pytest.mark.parametrize("is_cuda", [False, True])
def test_a_gpus_step_waits_for_no_layer(is_cuda: bool, adapters: Adapters) -> None:
    own, source = packer(), Slow()
    tensor = SimpleNamespace(is_cuda=is_cuda, device=torch.device("cpu"), nbytes=0)
    pool: Any = SimpleNamespace(
        tensor=tensor, geometry=own.geometry, block_bytes=1 << 30, num_blocks_for=lambda packed: 1
    )
    loads = AdapterLoads(pool, own, lambda ref: source, lambda: None)
    result = loads.start(adapters["r2"].ref, 1.0)
    assert source.half.wait(60)
    assert result.done() != is_cuda
    source.go.set()
    packed = result.result(60)
    if is_cuda:
        assert packed.partial is not None
        assert packed.partial.complete
    loads.close()
