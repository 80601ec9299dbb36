"""The CUDA C++ kernels, compiled for the CPU, against the reference: everything that does not need Triton.

Shapes: T tokens, S sequences.
"""

from __future__ import annotations

import ctypes
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from loray_kernels import AttentionMeta, DecodeStep, Decoding, KvLayout, Ops, PageCopy, Scoring
from loray_kernels.cuda import attention, tables
from loray_kernels.cuda.attention import AttentionWork, DecodeAttention
from loray_kernels.cuda.graphs import PaddedStep
from loray_kernels.cuda.ops import CudaOps
from loray_kernels.cuda.tables import MAX_SPLITS, SPLIT, AttentionTables, Items, pack_attention
from loray_kernels.cuda.upload import parts, piece_table, place_pages
from loray_kernels.kv import DirectWriter
from tests.fixtures.shim import NotingLauncher, compile_shim
from tests.kernels.backends import store
from tests.kernels.cases import (  # noqa: F401
    test_lora,
    test_norm_and_embedding_take_an_adapters_rows,
    test_rope_turns_pairs_of_halves,
)
from tests.kernels.cuda.cases import (  # noqa: F401
    REFERENCE,
    decode_step,
    decoding,
    near,
    randn,
    test_heads_of_a_decode_step,
    test_mixed_dtypes_go_to_the_reference,
    test_modules_of_one_input_in_a_mixed_step,
    test_norms,
    test_padding_has_no_keys,
    test_queries_that_begin_anywhere,
    test_rows_of_activations,
)


@pytest.fixture
def ops(gathers: CudaOps) -> CudaOps:
    return gathers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(9, 3, 64), (12, 1, 128), (2, 2, 40)])
def test_decode(ops: Ops, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_heads, num_kv, d = heads
    layout = KvLayout(num_layers=2, block_tokens=16, num_kv_heads=num_kv, head_dim=d)
    pool, meta = decoding(dtype, [1, 256, 257, 530], layout)
    expected = pool.clone()
    k_TKd, v_TKd, q_THd = randn(3, dtype, 4, num_kv, d), randn(4, dtype, 4, num_kv, d), randn(5, dtype, 4, num_heads, d)
    store(ops, pool, layout, 1, k_TKd, v_TKd, meta)
    store(REFERENCE, expected, layout, 1, k_TKd, v_TKd, meta)
    assert torch.equal(pool, expected)
    got, want = (o.paged_attention(q_THd, pool, layout, 1, meta, Scoring(d**-0.5)) for o in (ops, REFERENCE))
    near(got, want, dtype)


@pytest.mark.parametrize(
    ("longest", "dtype", "d"),
    [(64 * 256 + 1, torch.float32, 16), (3 * 64 * 256 + 5, torch.float32, 16), (3 * 64 * 256 + 5, torch.bfloat16, 64)],
)
def test_splits_of_long_contexts_are_longer(ops: CudaOps, longest: int, dtype: torch.dtype, d: int) -> None:
    """So there are at most 64 of a sequence, whose result does not depend on the others'. On tensor cores, too."""
    layout = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=d)
    pool, meta = decode_step(dtype, [longest, 600, 64 * 256, 7], layout)
    q_THd = 3 * randn(5, dtype, 4, 2, d)
    assert tables.pack_attention(meta, layout).max_splits == tables.MAX_SPLITS
    got = ops.paged_attention(q_THd, pool, layout, 0, meta, Scoring(0.125))
    near(got, REFERENCE.paged_attention(q_THd, pool, layout, 0, meta, Scoring(0.125)), dtype)
    for i in (0, 1, 3):
        alone = AttentionMeta((0, 1), meta.context_len[i : i + 1], meta.block_table[i : i + 1], meta.slot_mapping_T[:1])
        assert torch.equal(
            ops.paged_attention(q_THd[i : i + 1], pool, layout, 0, alone, Scoring(0.125)), got[i : i + 1]
        )


def test_partial_sums_have_a_bounded_memory(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits whose partial sums do not fit together come in several launches."""
    layout = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=2, head_dim=16)
    pool, meta = decoding(torch.float32, [530, 7, 300, 257, 1], layout)
    q_THd = randn(5, torch.float32, 5, 4, 16)
    expected = ops.paged_attention(q_THd, pool, layout, 0, meta, Scoring(0.25))
    made: list[int] = []
    empty = torch.empty

    def counted(*shape: Any, **kwargs: Any) -> torch.Tensor:
        made.append(out.nbytes if (out := empty(*shape, **kwargs)).dim() == 1 else 0)
        return out

    monkeypatch.setattr(attention.torch, "empty", counted)
    of_split = 4 * 4 * 18
    for num_bytes, most in ((1, 3 * of_split), (4 * of_split, 4 * of_split), (1 << 30, 5 * 3 * of_split)):
        monkeypatch.setattr(attention, "PARTIAL_BYTES", num_bytes)
        meta.prepared.pop((AttentionWork, None))
        assert torch.equal(ops.paged_attention(q_THd, pool, layout, 0, meta, Scoring(0.25)), expected)
        assert max(made) == most
        made.clear()


@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 16), (torch.bfloat16, 64)])
def test_a_padded_step_gives_what_the_step_gives(ops: Ops, dtype: torch.dtype, d: int) -> None:
    """Padding has no keys and writes none, and nothing is left of an earlier step in the tensors."""
    layout = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=2, head_dim=d)
    max_blocks = 20
    blocks = torch.zeros(6 * max_blocks + 1, dtype=torch.int64)
    tokens, whole = torch.zeros(6, dtype=torch.int64), Decoding(layout, 6, max_blocks, (), torch.device("cpu"))
    padded = PaddedStep(4, blocks, tokens, whole)
    q_THd, k_TKd = randn(6, dtype, 4, 4, d), randn(7, dtype, 4, 2, d)
    for contexts in ([300, 20, 16, 5], [7, 290]):
        pool, meta = decoding(dtype, contexts, layout)
        num, expected = len(contexts), pool.clone()
        slots = np.array([5, 1, 0, 2][:num])
        places = [int(s) * max_blocks + i for s, t in zip(slots, meta.block_table, strict=True) for i in range(len(t))]
        new = [int(block) for table in meta.block_table for block in table]
        none = np.array([], dtype=np.int64)
        padded.fill(DecodeStep(np.arange(num), np.array(contexts) - 1, slots, none, places, new))
        step = padded.step()
        store(ops, pool, layout, 0, k_TKd, k_TKd, step.attention)
        store(ops, expected, layout, 0, k_TKd[:num], k_TKd[:num], meta)
        assert torch.equal(pool, expected)
        out_THd = ops.paged_attention(q_THd, pool, layout, 0, step.attention, Scoring(0.25))
        assert torch.equal(out_THd[:num], ops.paged_attention(q_THd[:num], pool, layout, 0, meta, Scoring(0.25)))
        assert not out_THd[num:].any()
        assert step.positions_S[:num].tolist() == [c - 1 for c in contexts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [[0, 1, 2], [1, 3, 6, 7]])
def test_pages_are_scattered(launcher: NotingLauncher, layers: list[int], dtype: torch.dtype) -> None:
    rows_LE = randn(8, dtype, len(layers), 333)
    pieces = [PageCopy(0, 1024, 250), PageCopy(250, 17, 3), PageCopy(253, 301, 80)]  # at even and odd places
    offsets = [512 * layer for layer in layers]
    expected = torch.zeros(8000, dtype=dtype)
    for row_E, offset in zip(rows_LE, offsets, strict=True):
        for start, to, length in pieces:
            expected[offset + to : offset + to + length] = row_E[start : start + length]
    pool, direct = torch.zeros(8000, dtype=dtype), torch.zeros(8000, dtype=dtype)
    place_pages(launcher, pool, rows_LE, piece_table(333, offsets, pieces))
    DirectWriter(direct).write(rows_LE, offsets, pieces)
    assert torch.equal(pool, expected)
    assert torch.equal(direct, expected)
    for most in (1, 100, 333, 10_000):  # in parts, which need less memory at a time
        pool.zero_()
        for rows, table_P3 in parts(rows_LE.view(-1), piece_table(333, offsets, pieces), most):
            assert len(rows) <= most
            place_pages(launcher, pool, rows, table_P3)
        assert torch.equal(pool, expected)
    assert piece_table(333, [], pieces).shape == piece_table(333, offsets, []).shape == (0, 3)


def test_the_shim_reports_a_barrier_that_is_not_reached(launcher: NotingLauncher, tmp_path: Path) -> None:
    """Else a kernel that hangs on a GPU would pass here."""
    source = """
        #include "shim.h"
        extern "C" __global__ void hang(int *x) {
          if (threadIdx.x == 40) __shfl_xor_sync(~0u, 1, 1); else __syncthreads();
        }
        LORAY_EXPORT(hang)"""
    (tmp_path / "hang.cu").write_text(source)
    process = compile_shim(tmp_path / "hang.cu", tmp_path / "hang.so")
    assert process.wait() == 0
    pointer = (ctypes.c_void_p * 1)(ctypes.addressof(ctypes.c_int64(0)))
    assert ctypes.CDLL(str(tmp_path / "hang.so")).launch_hang((ctypes.c_uint * 3)(1, 1, 1), 64, pointer)


# -- decode attention on tensor cores


@pytest.mark.parametrize("d", [64, 128])
def test_they_take_what_they_can_read(ops: CudaOps, launcher: NotingLauncher, d: int) -> None:
    layout = KvLayout(num_layers=2, block_tokens=32, num_kv_heads=2, head_dim=d)
    pool, meta = decode_step(torch.bfloat16, [16, 300], layout)
    ops.paged_attention(randn(5, torch.bfloat16, 2, 6, d), pool, layout, 1, meta, Scoring(0.1))
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
    got = ops.paged_attention(q_THd, pool, layout, 0, meta, Scoring(0.1))
    near(got, REFERENCE.paged_attention(q_THd, pool, layout, 0, meta, Scoring(0.1)), dtype)
    assert [name.rpartition("_")[0] for name in launcher.kernels] == ["attention_plan", "attention_decode"]


# -- which splits of a decode step's sequences each block of attention computes


LAYOUT = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=2, head_dim=64)


def attention_grids(launcher: NotingLauncher) -> list[tuple[int, int, int]]:
    return [grid for kernel, grid in zip(launcher.kernels, launcher.grids, strict=True) if "plan" not in kernel]


def splits_of(context: int, window: int | None = None) -> range:
    """Those of which a part is in the window."""
    size = SPLIT
    while size * MAX_SPLITS < context:
        size *= 2
    behind = 0 if window is None else max(0, context - window) // size
    return range(behind, max(1, -(-context // size)))


def planned(launcher: NotingLauncher, contexts: list[int], window: int | None) -> AttentionWork:
    """As a recorded step plans it, which knows no context: for the longest that may be. Sequence i has query 2 i."""
    num, none = len(contexts), torch.zeros(0, dtype=torch.int64)
    tokens = torch.tensor([n for i in range(num) for n in (i, 2 * i)])
    tables = AttentionTables(none, torch.tensor(contexts), none, none, Items(tokens, num), Items(none, 0), MAX_SPLITS)
    return DecodeAttention(launcher).plan(tables, 8, LAYOUT, window)


@pytest.mark.parametrize("window", [None, 1, 500, 5000])
@pytest.mark.parametrize("room", [1, 100, 300, 1 << 20])
def test_each_split_that_there_is_has_one_launch_and_a_place_in_it(
    launcher: NotingLauncher, monkeypatch: pytest.MonkeyPatch, room: int, window: int | None
) -> None:
    """`room`: for partial sums of so many splits. 300 sequences are more than a block has threads."""
    monkeypatch.setattr(attention, "PARTIAL_BYTES", room * 4 * 8 * 66)
    generator = torch.Generator().manual_seed(1)
    contexts = (torch.rand(300, generator=generator) ** 6 * 40_000).long().tolist()
    contexts[:4] = [0, SPLIT, SPLIT + 1, 64 * SPLIT + 1]
    work = planned(launcher, contexts, window)
    starts, expected = (
        work.starts_G1.tolist(),
        [i * MAX_SPLITS + s for i, c in enumerate(contexts) for s in splits_of(c, window)],
    )
    assert work.splits[: len(expected)].tolist() == expected
    assert starts[0] == 0
    assert starts[-1] == len(expected)
    assert starts == sorted(starts)
    for launch, (start, stop) in enumerate(pairwise(starts)):
        own = expected[start:stop]
        assert not own or own[0] % MAX_SPLITS == splits_of(contexts[own[0] // MAX_SPLITS], window)[0]
        assert all(0 <= w - launch * work.most < work.room for w in range(start, stop))
    assert work.room <= max(room, MAX_SPLITS)
    assert not work.arrived.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_number_of_blocks_depends_on_the_device_alone(launcher: NotingLauncher, dtype: torch.dtype) -> None:
    """On one with a single multiprocessor four blocks for each KV head compute all; the bits are the same. Among them
    are sequences of one split, of many, and padding.
    """
    contexts = [5, 64 * SPLIT + 9, 0, 700, 3, 257, 1]
    pool, meta = decode_step(dtype, contexts, LAYOUT)
    q_THd = 2 * randn(5, dtype, len(contexts), 6, 64)
    found = []
    for processors in (1, 132):
        launcher.forget()
        meta.prepared.clear()
        ops = CudaOps(launcher, cast(Any, None), num_processors=processors)
        found.append([ops.paged_attention(q_THd, pool, LAYOUT, 0, meta, Scoring(0.125)) for _ in range(2)])
        assert attention_grids(launcher) == [(4 if processors == 1 else len(contexts) * MAX_SPLITS, 2, 1)] * 2
        work: AttentionWork = meta.prepared[AttentionWork, None]
        assert work.starts_G1.tolist() == [0, sum(len(splits_of(context)) for context in contexts)]
        assert not work.arrived.any()
    near(found[0][0], REFERENCE.paged_attention(q_THd, pool, LAYOUT, 0, meta, Scoring(0.125)), dtype)
    for got in (found[0][1], *found[1]):  # of a second layer, too
        assert torch.equal(got, found[0][0])


def test_layers_with_a_window_have_a_plan_of_their_own(launcher: NotingLauncher) -> None:
    """Made once for all of them; blocks behind the window are not read."""
    contexts, window = [5, 40 * SPLIT + 9, 0, 700], 300
    pool, meta = decode_step(torch.bfloat16, contexts, LAYOUT)
    q_THd = 2 * randn(5, torch.bfloat16, len(contexts), 6, 64)
    ops, windowed = CudaOps(launcher, cast(Any, None)), Scoring(0.125, window)
    for scoring in (Scoring(0.125), windowed, windowed, Scoring(0.125)):
        got = ops.paged_attention(q_THd, pool, LAYOUT, 0, meta, scoring)
        near(got, REFERENCE.paged_attention(q_THd, pool, LAYOUT, 0, meta, scoring), torch.bfloat16)
    assert launcher.kernels.count("attention_plan_fp32") == 2
    starts = [meta.prepared[AttentionWork, own].starts_G1.tolist() for own in (None, window)]
    assert starts == [[0, 1 + 41 + 1 + 3], [0, 1 + 3 + 1 + 2]]


def test_a_large_step_has_no_more_blocks_than_keep_the_device_busy(launcher: NotingLauncher) -> None:
    """32 sequences that may have 64 splits, and have one."""
    contexts = [20] * 32
    pool, meta = decode_step(torch.bfloat16, contexts, LAYOUT)
    ops, q_THd = CudaOps(launcher, cast(Any, None), num_processors=16), randn(5, torch.bfloat16, 32, 4, 64)
    tables = AttentionTables(
        torch.arange(33),
        torch.tensor(contexts),
        torch.arange(32) * 2,
        torch.cat(meta.block_table),
        Items(torch.arange(32).repeat_interleave(2), 32),
        Items(torch.zeros(0, dtype=torch.int64), 0),
        MAX_SPLITS,
    )
    meta.prepared[pack_attention] = tables
    got = ops.paged_attention(q_THd, pool, LAYOUT, 0, meta, Scoring(0.125))
    (grid,) = attention_grids(launcher)
    assert grid == (64, 2, 1)  # eight for each multiprocessor, where there were 32 × 2 × 64
    assert meta.prepared[AttentionWork, None].starts_G1.tolist() == [0, 32]
    near(got, REFERENCE.paged_attention(q_THd, pool, LAYOUT, 0, meta, Scoring(0.125)), torch.bfloat16)
