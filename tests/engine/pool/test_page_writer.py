"""Rows that are written while steps run: nothing reads or overwrites them before they are written.

The tests of the pool, with a writer that delays every copy until it is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from loray.engine import build
from loray.engine.pool.pool import Pool, ResidentAdapter
from loray.methods.weights import AdapterWeights, SharedProjection
from loray.spec import AdapterRef
from loray_kernels import Ops, PageCopy, PageWriter, backend
from loray_kernels.kv import DirectWriter
from tests.engine.adapters import TestAdapter
from tests.engine.late import Late
from tests.engine.pool.test_packed import LAYOUT, check_rows, packer, weights
from tests.engine.pool.test_pool import (  # noqa: F401
    test_a_pair_comes_in_though_no_stretch_of_blocks_is_free,
    test_logits_are_the_same_bits_with_and_without,
)


class LateWriter(Late):
    """A PageWriter that writes in `wait`."""

    def __init__(self, pool: Tensor) -> None:
        super().__init__()
        self._direct = DirectWriter(pool)

    def write(self, rows_LE: Tensor, layer_offsets: Sequence[int], pieces: Sequence[PageCopy]) -> None:
        self.late.append(lambda: self._direct.write(rows_LE, layer_offsets, pieces))


@pytest.fixture(autouse=True)
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Tensor], PageWriter]]:
    """The page writer of every engine, and of pools without one."""
    writers: list[LateWriter] = []

    def page_writer(pool: Tensor) -> PageWriter:
        writers.append(LateWriter(pool))
        return writers[-1]

    def late_backend(name: str, device: object) -> Ops:
        ops = backend(name)
        ops.page_writer = page_writer  # type: ignore[method-assign]
        return ops

    monkeypatch.setattr(build, "backend", late_backend)
    yield page_writer
    assert any(writer.num_late for writer in writers)


def make_pool(late: Callable[[Tensor], PageWriter], num_blocks: int) -> Pool:
    return Pool(LAYOUT, num_blocks, dtype=torch.float32, device=torch.device("cpu"), page_writer=late)


def place(pool: Pool, ref: AdapterRef, own: AdapterWeights) -> ResidentAdapter:
    resident = pool.place(ref, packer().pack(own))
    assert resident is not None
    return resident


def test_rows_that_have_just_been_placed_make_way_for_a_pair(
    late: Callable[[Tensor], PageWriter], adapters: dict[str, TestAdapter]
) -> None:
    pool, ref = make_pool(late, 12), adapters["r2"].ref
    lora = [weights(dict.fromkeys(range(4), 1), wide=20, narrow=20, seed=i) for i in range(3)]  # four blocks each
    residents = [place(pool, ref, w) for w in lora]
    for resident in residents[::2]:
        pool.remove(resident)
    half = 3 * pool.geometry.block_size
    pair = SharedProjection(torch.rand(2, half // 2), torch.rand(half // 2, 2), "pair")
    place(pool, ref, AdapterWeights(modules={}, pair=pair))
    check_rows(pool, residents[1], lora[1])


def test_rows_of_an_adapter_that_has_gone_again_do_not_come_over_a_pair(
    late: Callable[[Tensor], PageWriter], adapters: dict[str, TestAdapter]
) -> None:
    pool, ref = make_pool(late, 4), adapters["r2"].ref
    pool.remove(place(pool, ref, weights(dict.fromkeys(range(4), 1), wide=20, narrow=20)))
    half = 2 * pool.geometry.block_size
    pair = SharedProjection(torch.rand(2, half // 2), torch.rand(half // 2, 2), "pair")
    placed = place(pool, ref, AdapterWeights(modules={}, pair=pair)).pair
    pool.wait_for_rows()
    assert placed is not None
    assert torch.equal(placed.a_RI.data, pair.a_RI)
    assert torch.equal(placed.b_OR.data, pair.b_OR)
