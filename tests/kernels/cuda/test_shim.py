"""The CUDA C++ kernels, compiled for the CPU, against the reference: everything that does not need Triton.

Shapes: T tokens, S sequences.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from loray_kernels import (
    ITEM_TOKENS,
    MAX_PAIR_RANK,
    AttentionMeta,
    BackendUnavailable,
    DecodeStep,
    Decoding,
    KvLayout,
    Ops,
    PageCopy,
    backend,
    use_device,
)
from loray_kernels import sampling as draws
from loray_kernels.cuda import kernels, sampling, tables
from loray_kernels.cuda import launch as nvrtc
from loray_kernels.cuda.graphs import PaddedStep
from loray_kernels.cuda.kernels import Gather
from loray_kernels.cuda.launch import FILES, SOURCES, Compiled, compile_source
from loray_kernels.cuda.ops import CudaOps
from loray_kernels.cuda.upload import parts, piece_table
from loray_kernels.kv import DirectWriter
from loray_kernels.sampling import MAX_TOP
from tests.kernels.cuda.cases import (  # noqa: F401
    REFERENCE,
    decoding,
    near,
    randn,
    test_mixed_dtypes_go_to_the_reference,
    test_modules_of_one_input_in_a_mixed_step,
    test_norms,
    test_rows_of_activations,
)
from tests.kernels.cuda.shim import ShimLauncher, compile_shim
from tests.kernels.keys import store
from tests.kernels.test_ops import (  # noqa: F401
    test_lora,
    test_norm_and_embedding_take_an_adapters_rows,
    test_rope_turns_pairs_of_halves,
)


@pytest.fixture(scope="module")
def launcher() -> ShimLauncher:
    try:
        return ShimLauncher()
    except BackendUnavailable as e:
        pytest.skip(str(e))


@pytest.fixture
def ops(launcher: ShimLauncher, monkeypatch: pytest.MonkeyPatch) -> Ops:
    """The tokens of every adapter are gathered, however many it has."""
    monkeypatch.setattr(tables, "GATHER_BELOW", 1 << 30)
    return CudaOps(Gather(launcher), cast(Any, None))


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
    got, want = (o.paged_attention(q_THd, pool, layout, 1, meta, d**-0.5) for o in (ops, REFERENCE))
    near(got, want, dtype)


@pytest.mark.parametrize("longest", [64 * 256 + 1, 3 * 64 * 256 + 5])
def test_splits_of_long_contexts_are_longer(ops: Ops, longest: int) -> None:
    """So there are at most 64 of a sequence, whose result does not depend on the others'."""
    layout = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=16)
    pool, meta = decoding(torch.float32, [longest, 600, 64 * 256, 7], layout)
    q_THd = 3 * randn(5, torch.float32, 4, 2, 16)
    assert tables.pack_attention(meta, layout).max_splits == tables.MAX_SPLITS
    got = ops.paged_attention(q_THd, pool, layout, 0, meta, 0.25)
    near(got, REFERENCE.paged_attention(q_THd, pool, layout, 0, meta, 0.25), torch.float32)
    alone = AttentionMeta((0, 1), (600,), meta.block_table[1:2], meta.slot_mapping_T[1:2])
    assert torch.equal(ops.paged_attention(q_THd[1:2], pool, layout, 0, alone, 0.25), got[1:2])


def test_partial_sums_have_a_bounded_memory(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits whose partial sums do not fit together come in several launches."""
    layout = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=2, head_dim=16)
    pool, meta = decoding(torch.float32, [530, 7, 300, 257, 1], layout)
    q_THd = randn(5, torch.float32, 5, 4, 16)
    expected = ops.paged_attention(q_THd, pool, layout, 0, meta, 0.25)
    made: list[int] = []
    empty = torch.empty

    def counted(*shape: Any, **kwargs: Any) -> torch.Tensor:
        made.append(out.nbytes if (out := empty(*shape, **kwargs)).dim() == 1 else 0)
        return out

    monkeypatch.setattr(kernels.torch, "empty", counted)
    of_split = 4 * 4 * 18
    for num_bytes, most in ((1, 3 * of_split), (4 * of_split, 4 * of_split), (1 << 30, 5 * 3 * of_split)):
        monkeypatch.setattr(kernels, "PARTIAL_BYTES", num_bytes)
        meta.memo.pop("cuda work")
        assert torch.equal(ops.paged_attention(q_THd, pool, layout, 0, meta, 0.25), expected)
        assert max(made) == most
        made.clear()


def test_tables_of_many_sequences_start_one_after_another() -> None:
    layout = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=16)
    _, meta = decoding(torch.float32, [33, 1, 16, 17], layout)
    assert tables.pack_attention(meta, layout).table_start.tolist() == [0, 3, 4, 5]


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
        padded.words.fill(DecodeStep(np.arange(num), np.array(contexts) - 1, slots, none, places, new))
        step = padded.step()
        store(ops, pool, layout, 0, k_TKd, k_TKd, step.attention)
        store(ops, expected, layout, 0, k_TKd[:num], k_TKd[:num], meta)
        assert torch.equal(pool, expected)
        out_THd = ops.paged_attention(q_THd, pool, layout, 0, step.attention, 0.25)
        assert torch.equal(out_THd[:num], ops.paged_attention(q_THd[:num], pool, layout, 0, meta, 0.25))
        assert not out_THd[num:].any()
        assert step.positions_S[:num].tolist() == [c - 1 for c in contexts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [[0, 1, 2], [1, 3, 6, 7]])
def test_pages_are_scattered(launcher: ShimLauncher, layers: list[int], dtype: torch.dtype) -> None:
    rows_LE = randn(8, dtype, len(layers), 333)
    pieces = [PageCopy(0, 1024, 250), PageCopy(250, 17, 3), PageCopy(253, 301, 80)]  # at even and odd places
    offsets = [512 * layer for layer in layers]
    expected = torch.zeros(8000, dtype=dtype)
    for row_E, offset in zip(rows_LE, offsets, strict=True):
        for start, to, length in pieces:
            expected[offset + to : offset + to + length] = row_E[start : start + length]
    pool, direct = torch.zeros(8000, dtype=dtype), torch.zeros(8000, dtype=dtype)
    Gather(launcher).place_pages(pool, rows_LE, piece_table(333, offsets, pieces))
    DirectWriter(direct).write(rows_LE, offsets, pieces)
    assert torch.equal(pool, expected)
    assert torch.equal(direct, expected)
    for most in (1, 100, 333, 10_000):  # in parts, which need less memory at a time
        pool.zero_()
        for rows, table_P3 in parts(rows_LE.view(-1), piece_table(333, offsets, pieces), most):
            assert len(rows) <= most
            Gather(launcher).place_pages(pool, rows, table_P3)
        assert torch.equal(pool, expected)
    assert piece_table(333, [], pieces).shape == piece_table(333, offsets, []).shape == (0, 3)


def test_the_shim_reports_a_barrier_that_is_not_reached(launcher: ShimLauncher, tmp_path: Path) -> None:
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


def test_launches_and_kernels_agree() -> None:
    sources = {path.name: path.read_text() for path in SOURCES.iterdir()}

    def constant(file: str, name: str) -> int:
        (value,) = re.findall(rf"constexpr int {name} = (\d+);", sources[file])
        return int(value)

    assert constant("lora.cu", "TOKENS") == constant("vera.cu", "TOKENS") == tables.GATHER_TOKENS == ITEM_TOKENS
    assert constant("lora.cu", "WARPS") == constant("vera.cu", "WARPS") == kernels._SHRINK_WARPS
    assert constant("vera.cu", "RANK") == MAX_PAIR_RANK
    assert 2 * constant("lora.cu", "THREADS") == 2 * kernels._EXPAND_THREADS == tables.TILE_COLUMNS
    assert constant("splits.cuh", "SPLIT") == tables.SPLIT
    assert constant("splits.cuh", "MAX_SPLITS") == tables.MAX_SPLITS
    assert constant("splits.cuh", "GROUP") == kernels._GROUP
    assert constant("tensor.cuh", "KEYS") == kernels._TENSOR_KEYS
    assert constant("attention.cu", "HEAD") == kernels.MAX_HEAD_DIM
    assert constant("draw.cuh", "THREADS") == constant("draw.cuh", "BLOCK") == sampling._THREADS
    assert constant("draw.cuh", "BLOCK") == draws._BLOCK
    assert constant("draw.cuh", "BLOCK") * constant("draw.cuh", "MAX_BLOCKS") == sampling.MAX_VOCAB <= 1 << 20
    assert constant("choose.cu", "MAX_TOP") == MAX_TOP
    assert {constant(f, "THREADS") for f in ("splits.cuh", "rows.cu", "vera.cu")} == {kernels._THREADS}
    assert constant("rows.cu", "NORM_THREADS") == kernels._NORM_THREADS


@pytest.mark.parametrize("arch", [*(pytest.param(a, marks=pytest.mark.slow) for a in ("sm_80", "sm_100")), "sm_90"])
def test_nvrtc_compiles_every_kernel(arch: str) -> None:
    """Without toolkit headers; no kernel spills registers."""
    try:
        logs = [compile_source(name, arch).log for name in FILES]
    except BackendUnavailable as e:
        if "need NVRTC" in str(e):
            pytest.skip(str(e))
        raise
    spills = re.findall(r"(\d+) bytes spill stores", "".join(logs))
    assert len(spills) == 3 * 13 + 2 * 2 + 3  # in three dtypes, on tensor cores in two, those of any dtype
    assert set(spills) == {"0"}


def test_machine_code_is_kept_and_a_folder_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "version", lambda: (12, 8))
    monkeypatch.setattr(nvrtc, "compile_source", lambda name, arch: Compiled(b"code", ""))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = nvrtc.cubin("rows.cu", "sm_90")
    assert path.read_bytes() == b"code"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BackendUnavailable, match="set XDG_CACHE_HOME to a folder that can be written"):
        nvrtc.cubin("rows.cu", "sm_90")


def test_without_a_gpu_the_backend_says_why() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(BackendUnavailable, match="need an NVIDIA GPU"):
        backend("cuda", "cuda")
    with pytest.raises(ValueError, match="on a GPU, not on cpu"):
        backend("cuda")
    assert type(backend("auto", "cuda")).__name__ == "ReferenceOps"


def test_a_device_without_an_index_is_the_threads_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made_current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    assert use_device(torch.device("cuda")) == torch.device("cuda", 3)
    assert use_device(torch.device("cuda:1")) == torch.device("cuda", 1)
    assert made_current == [torch.device("cuda", 3), torch.device("cuda", 1)]
    assert use_device(torch.device("cpu")) == torch.device("cpu")
    assert len(made_current) == 2
