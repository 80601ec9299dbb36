"""Which splits of a decode step's sequences each block of attention computes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import pytest
import torch

from loray_kernels import BackendUnavailable, KvLayout
from loray_kernels.cuda import kernels
from loray_kernels.cuda.kernels import AttentionWork, Gather
from loray_kernels.cuda.launch import Argument
from loray_kernels.cuda.ops import CudaOps
from loray_kernels.cuda.tables import MAX_SPLITS, SPLIT, AttentionTables, Items
from tests.kernels.cuda.cases import REFERENCE, decode_step, near, randn
from tests.kernels.cuda.shim import ShimLauncher

LAYOUT = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=2, head_dim=64)


class GridLauncher:
    """A ShimLauncher that remembers the grids of attention."""

    def __init__(self) -> None:
        self._launcher, self.grids = ShimLauncher(), list[tuple[int, int, int]]()

    def __call__(self, kernel: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Argument]) -> None:
        if "plan" not in kernel:
            self.grids.append(grid)
        self._launcher(kernel, grid, threads, arguments)


@pytest.fixture
def launcher() -> GridLauncher:
    try:
        return GridLauncher()
    except BackendUnavailable as e:
        pytest.skip(str(e))


def splits_of(context: int) -> int:
    size = SPLIT
    while size * MAX_SPLITS < context:
        size *= 2
    return max(1, -(-context // size))


def planned(launcher: GridLauncher, contexts: list[int]) -> AttentionWork:
    """As a recorded step plans it, which knows no context: for the longest that may be. Sequence i has query 2 i."""
    num, none = len(contexts), torch.zeros(0, dtype=torch.int64)
    tokens = torch.tensor([n for i in range(num) for n in (i, 2 * i)])
    tables = AttentionTables(none, torch.tensor(contexts), none, none, Items(tokens, num), Items(none, 0), MAX_SPLITS)
    return Gather(launcher).plan_attention(tables, 8, LAYOUT)


@pytest.mark.parametrize("room", [1, 100, 300, 1 << 20])
def test_each_split_that_there_is_has_one_launch_and_a_place_in_it(
    launcher: GridLauncher, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """`room`: for partial sums of so many splits. 300 sequences are more than a block has threads."""
    monkeypatch.setattr(kernels, "PARTIAL_BYTES", room * 4 * 8 * 66)
    generator = torch.Generator().manual_seed(1)
    contexts = (torch.rand(300, generator=generator) ** 6 * 40_000).long().tolist()
    contexts[:4] = [0, SPLIT, SPLIT + 1, 64 * SPLIT + 1]
    work = planned(launcher, contexts)
    starts, expected = (
        work.starts_G1.tolist(),
        [i * MAX_SPLITS + s for i, c in enumerate(contexts) for s in range(splits_of(c))],
    )
    assert work.splits[: len(expected)].tolist() == expected
    assert starts[0] == 0
    assert starts[-1] == len(expected)
    assert starts == sorted(starts)
    for launch, (start, stop) in enumerate(pairwise(starts)):
        own = expected[start:stop]
        assert not own or own[0] % MAX_SPLITS == 0
        assert all(0 <= w - launch * work.most < work.room for w in range(start, stop))
    assert work.room <= max(room, MAX_SPLITS)
    assert not work.arrived.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_number_of_blocks_depends_on_the_device_alone(launcher: GridLauncher, dtype: torch.dtype) -> None:
    """On one with a single multiprocessor four blocks for each KV head compute all; the bits are the same. Among them
    are sequences of one split, of many, and padding.
    """
    contexts = [5, 64 * SPLIT + 9, 0, 700, 3, 257, 1]
    pool, meta = decode_step(dtype, contexts, LAYOUT)
    q_THd = 2 * randn(5, dtype, len(contexts), 6, 64)
    found = []
    for processors in (1, 132):
        launcher.grids.clear()
        meta.memo.clear()
        ops = CudaOps(Gather(launcher, processors), cast(Any, None))
        found.append([ops.paged_attention(q_THd, pool, LAYOUT, 0, meta, 0.125) for _ in range(2)])
        assert launcher.grids == [(4 if processors == 1 else len(contexts) * MAX_SPLITS, 2, 1)] * 2
        work: AttentionWork = meta.memo["cuda work"]
        assert work.starts_G1.tolist() == [0, sum(map(splits_of, contexts))]
        assert not work.arrived.any()
    near(found[0][0], REFERENCE.paged_attention(q_THd, pool, LAYOUT, 0, meta, 0.125), dtype)
    for got in (found[0][1], *found[1]):  # of a second layer, too
        assert torch.equal(got, found[0][0])


def test_a_large_step_has_no_more_blocks_than_keep_the_device_busy(launcher: GridLauncher) -> None:
    """32 sequences that may have 64 splits, and have one."""
    contexts = [20] * 32
    pool, meta = decode_step(torch.bfloat16, contexts, LAYOUT)
    ops, q_THd = CudaOps(Gather(launcher, 16), cast(Any, None)), randn(5, torch.bfloat16, 32, 4, 64)
    tables = AttentionTables(
        torch.arange(33),
        torch.tensor(contexts),
        torch.arange(32) * 2,
        torch.cat(meta.block_table),
        Items(torch.arange(32).repeat_interleave(2), 32),
        Items(torch.zeros(0, dtype=torch.int64), 0),
        MAX_SPLITS,
    )
    meta.memo["cuda"] = tables
    got = ops.paged_attention(q_THd, pool, LAYOUT, 0, meta, 0.125)
    (grid,) = launcher.grids
    assert grid == (64, 2, 1)  # eight for each multiprocessor, where there were 32 × 2 × 64
    assert meta.memo["cuda work"].starts_G1.tolist() == [0, 32]
    near(got, REFERENCE.paged_attention(q_THd, pool, LAYOUT, 0, meta, 0.125), torch.bfloat16)
