"""Decode attention on tensor cores, compiled for the CPU, against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from loray_kernels import AttentionMeta, BackendUnavailable, KvLayout
from loray_kernels.cuda import tables
from loray_kernels.cuda.gather import Gather
from loray_kernels.cuda.launch import Argument
from loray_kernels.cuda.ops import CudaOps
from tests.kernels.cuda.cases import REFERENCE, near, randn
from tests.kernels.cuda.shim import ShimLauncher

HALVES = [torch.bfloat16, torch.float16]


class Noted:
    """A launcher that keeps the names of what it launches."""

    def __init__(self, launcher: ShimLauncher) -> None:
        self._launcher, self.kernels = launcher, list[str]()

    def __call__(self, kernel: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Argument]) -> None:
        self.kernels.append(kernel)
        self._launcher(kernel, grid, threads, arguments)


@pytest.fixture(scope="module")
def launcher() -> Noted:
    try:
        return Noted(ShimLauncher())
    except BackendUnavailable as e:
        pytest.skip(str(e))


@pytest.fixture
def ops(launcher: Noted) -> CudaOps:
    launcher.kernels.clear()
    return CudaOps(Gather(launcher), cast(Any, None))


def step(dtype: torch.dtype, contexts: list[int], layout: KvLayout) -> tuple[torch.Tensor, AttentionMeta]:
    """A pool whose blocks are scattered, and a step of a query for each context. What no sequence has is no number."""
    size = layout.block_tokens
    lengths = [-(-context // size) for context in contexts]
    blocks = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(1)).split(lengths)
    pool = randn(2, dtype, sum(lengths), layout.num_layers, 2, size, layout.num_kv_heads, layout.head_dim)
    for own, context in zip(blocks, contexts, strict=True):
        if context % size:
            pool[own[-1], :, :, context % size :] = torch.nan
    meta = AttentionMeta(tuple(range(len(contexts) + 1)), tuple(contexts), blocks, torch.zeros(len(contexts)).long())
    return pool.flatten(), meta


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("num_heads", "num_kv", "d"), [(9, 3, 64), (8, 2, 128), (12, 1, 128), (2, 2, 64), (20, 1, 64)])
@pytest.mark.parametrize("block_tokens", [16, 48])
def test_heads(
    ops: CudaOps, launcher: Noted, num_heads: int, num_kv: int, d: int, block_tokens: int, dtype: torch.dtype
) -> None:
    layout = KvLayout(num_layers=2, block_tokens=block_tokens, num_kv_heads=num_kv, head_dim=d)
    pool, meta = step(dtype, [1, 15, 16, 63, 255, 256, 257, 530, 700], layout)
    q_THd = 2 * randn(5, dtype, 9, num_heads, d)
    got = ops.paged_attention(q_THd, pool, layout, 1, meta, d**-0.5)
    near(got, REFERENCE.paged_attention(q_THd, pool, layout, 1, meta, d**-0.5), dtype)
    assert {name.rpartition("_")[0] for name in launcher.kernels} == {f"attention_tensor{d}", "attention_combine"}


@pytest.mark.parametrize("dtype", HALVES)
def test_queries_that_begin_anywhere(ops: CudaOps, dtype: torch.dtype) -> None:
    """As a slice of a wider row, whose address is no multiple of 16 bytes."""
    layout = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=2, head_dim=64)
    pool, meta = step(dtype, [5, 40], layout)
    q_THd = randn(5, dtype, 2, 4 * 64 + 3)[:, 3:].unflatten(1, (4, 64))
    near(
        ops.paged_attention(q_THd, pool, layout, 0, meta, 0.125),
        REFERENCE.paged_attention(q_THd, pool, layout, 0, meta, 0.125),
        dtype,
    )


def test_long_contexts_and_company(ops: CudaOps) -> None:
    """A split of several turns; a sequence's result does not depend on the others."""
    layout = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=64)
    pool, meta = step(torch.bfloat16, [3 * 64 * 256 + 5, 600, 7], layout)
    q_THd = 3 * randn(5, torch.bfloat16, 3, 2, 64)
    assert tables.pack_attention(meta, layout).max_splits == tables.MAX_SPLITS
    got = ops.paged_attention(q_THd, pool, layout, 0, meta, 0.125)
    near(got, REFERENCE.paged_attention(q_THd, pool, layout, 0, meta, 0.125), torch.bfloat16)
    for i in range(3):
        alone = AttentionMeta((0, 1), meta.context_len[i : i + 1], meta.block_table[i : i + 1], meta.slots_T[:1])
        assert torch.equal(ops.paged_attention(q_THd[i : i + 1], pool, layout, 0, alone, 0.125), got[i : i + 1])


def test_padding_has_no_keys(ops: CudaOps) -> None:
    layout = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=128)
    pool, meta = step(torch.float16, [3, 0], layout)
    got = ops.paged_attention(randn(5, torch.float16, 2, 2, 128), pool, layout, 0, meta, 0.125)
    assert torch.equal(got[1], torch.zeros_like(got[1]))
    assert bool(got[0].isfinite().all())


@pytest.mark.parametrize(
    ("dtype", "block_tokens", "d", "first"),
    [
        (torch.float32, 16, 64, 0),
        (torch.float16, 8, 64, 0),
        (torch.float16, 16, 40, 0),
        (torch.bfloat16, 16, 256, 0),
        (torch.bfloat16, 16, 64, 4),
    ],
)
def test_what_they_cannot_read_is_not_theirs(
    ops: CudaOps, launcher: Noted, dtype: torch.dtype, block_tokens: int, d: int, first: int
) -> None:
    """Another type, blocks that are cut elsewhere, other heads, and a pool that begins between 16 bytes."""
    layout = KvLayout(num_layers=1, block_tokens=block_tokens, num_kv_heads=1, head_dim=d)
    whole, meta = step(dtype, [16, 32], layout)
    pool = torch.cat([whole.new_zeros(first), whole])[first:]
    q_THd = randn(5, dtype, 2, 2, d)
    got = ops.paged_attention(q_THd, pool, layout, 0, meta, 0.1)
    near(got, REFERENCE.paged_attention(q_THd, pool, layout, 0, meta, 0.1), dtype)
    assert [name.rpartition("_")[0] for name in launcher.kernels] == ["attention_decode"]
