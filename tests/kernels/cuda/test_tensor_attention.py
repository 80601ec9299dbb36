"""Decode attention on tensor cores, compiled for the CPU, against the reference."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from loray_kernels import AttentionMeta, BackendUnavailable, KvLayout
from loray_kernels.cuda import tables
from loray_kernels.cuda.kernels import Gather
from loray_kernels.cuda.ops import CudaOps
from tests.kernels.cuda.cases import (  # noqa: F401
    REFERENCE,
    decode_step,
    near,
    randn,
    test_heads_of_a_decode_step,
    test_padding_has_no_keys,
    test_queries_that_begin_anywhere,
)
from tests.kernels.cuda.shim import NotingLauncher


@pytest.fixture(scope="module")
def launcher() -> NotingLauncher:
    try:
        return NotingLauncher()
    except BackendUnavailable as e:
        pytest.skip(str(e))


@pytest.fixture
def ops(launcher: NotingLauncher) -> CudaOps:
    launcher.kernels.clear()
    return CudaOps(Gather(launcher), cast(Any, None))


def test_long_contexts_and_company(ops: CudaOps) -> None:
    """A split of several turns; a sequence's result does not depend on the others."""
    layout = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=64)
    pool, meta = decode_step(torch.bfloat16, [3 * 64 * 256 + 5, 600, 7], layout)
    q_THd = 3 * randn(5, torch.bfloat16, 3, 2, 64)
    assert tables.pack_attention(meta, layout).max_splits == tables.MAX_SPLITS
    got = ops.paged_attention(q_THd, pool, layout, 0, meta, 0.125)
    near(got, REFERENCE.paged_attention(q_THd, pool, layout, 0, meta, 0.125), torch.bfloat16)
    for i in range(3):
        alone = AttentionMeta((0, 1), meta.context_len[i : i + 1], meta.block_table[i : i + 1], meta.slot_mapping_T[:1])
        assert torch.equal(ops.paged_attention(q_THd[i : i + 1], pool, layout, 0, alone, 0.125), got[i : i + 1])


@pytest.mark.parametrize("d", [64, 128])
def test_they_take_what_they_can_read(ops: CudaOps, launcher: NotingLauncher, d: int) -> None:
    layout = KvLayout(num_layers=2, block_tokens=32, num_kv_heads=2, head_dim=d)
    pool, meta = decode_step(torch.bfloat16, [16, 300], layout)
    ops.paged_attention(randn(5, torch.bfloat16, 2, 6, d), pool, layout, 1, meta, 0.1)
    assert launcher.kernels == ["attention_plan_fp32", f"attention_tensor{d}_bf16"]


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
    ops: CudaOps, launcher: NotingLauncher, dtype: torch.dtype, block_tokens: int, d: int, first: int
) -> None:
    """Another type, blocks that are cut elsewhere, other heads, and a pool that begins between 16 bytes."""
    layout = KvLayout(num_layers=1, block_tokens=block_tokens, num_kv_heads=1, head_dim=d)
    whole, meta = decode_step(dtype, [16, 32], layout)
    pool = torch.cat([whole.new_zeros(first), whole])[first:]
    q_THd = randn(5, dtype, 2, 2, d)
    got = ops.paged_attention(q_THd, pool, layout, 0, meta, 0.1)
    near(got, REFERENCE.paged_attention(q_THd, pool, layout, 0, meta, 0.1), dtype)
    assert [name.rpartition("_")[0] for name in launcher.kernels] == ["attention_plan", "attention_decode"]
