"""The cuda backend on a GPU: the tests of every backend, those of cuda, adapters placed while steps run, a recorded
step. Needs nothing but torch, Triton, CuPy and pytest.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loray_kernels import (
    AdapterSegments,
    AttentionMeta,
    CapturedStep,
    CaptureLimits,
    DecodeStep,
    Decoding,
    KvLayout,
    LoraTable,
    Ops,
    PageCopy,
    ProjectionMatrix,
    RowOverrides,
    RowTables,
    Scoring,
    StepInputs,
    VeraTable,
    backend,
    use_device,
)
from loray_kernels.cuda.graphs import DecodeGraphs
from tests.kernels.backends import store
from tests.kernels.cases import *  # noqa: F403
from tests.kernels.cuda.cases import *  # noqa: F403
from tests.kernels.cuda.cases import near, randn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


def moved(value: Any, device: str) -> Any:
    """The same value with its tensors on `device`."""
    match value:
        case Tensor():
            return value.to(device)
        case LoraTable():
            return LoraTable(moved(value.a, device), moved(value.b, device), value.rank_start, value.scale)
        case ProjectionMatrix():
            return ProjectionMatrix(value.data.to(device))
        case VeraTable():
            parts = (moved(v, device) for v in (value.a_RI, value.b_OR, value.d, value.b))
            return VeraTable(*parts, value.start, value.stop)
        case RowOverrides():
            return RowOverrides(moved(value.tokens_N, device), moved(value.rows, device))
        case RowTables():
            return RowTables(tuple((c, w, moved(o, device)) for c, w, o in value.segments))
        case AttentionMeta():
            tables = tuple(moved(t, device) for t in value.block_table)
            return AttentionMeta(value.query_start, value.context_len, tables, moved(value.slot_mapping_T, device))
        case AdapterSegments():
            return AdapterSegments(value.start, value.stop)
        case StepInputs():
            return StepInputs(*(moved(getattr(value, field.name), device) for field in fields(value) if field.init))
        case tuple() if not isinstance(value, KvLayout):
            return tuple(moved(v, device) for v in value)
    return value


class OnGpu:
    """Ops for tensors on the CPU: arguments are copied to the GPU, and what an op writes is copied back."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            there = [moved(a, "cuda") for a in arguments]
            result = moved(getattr(self._ops, name)(*there), "cpu")
            for own, other in zip(arguments, there, strict=True):
                pairs = (
                    zip(own, other, strict=True) if name == "lora_expand" and isinstance(own, tuple) else [(own, other)]
                )
                for a, b in pairs:
                    if isinstance(a, Tensor) and name in ("lora_expand", "vera_expand"):
                        a.copy_(b)
                    elif isinstance(a, StepInputs):
                        a.pool.copy_(b.pool)
            return result

        return call


@pytest.fixture(scope="module")
def ops() -> Any:
    """All kernels our own, also where FlashInfer is installed."""
    found: Any = backend("cuda", "cuda")
    found._flash = None
    return OnGpu(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flashinfers_attention_is_ours(dtype: torch.dtype) -> None:
    from loray_kernels.cuda.flash import flash_prompts

    found: Any = backend("cuda", "cuda")
    device = torch.device("cuda")
    flash = flash_prompts(device)
    if flash is None:
        pytest.skip("FlashInfer cannot be imported here")
    layout = KvLayout(num_layers=2, block_tokens=16, num_kv_heads=2, head_dim=128)
    pool = randn(2, dtype, 64 * 2 * layout.layer_share).cuda()
    blocks = torch.randperm(64).cuda().split(16)
    meta = AttentionMeta((0, 40, 41, 241), (40, 90, 250), blocks[:3], torch.zeros(241, dtype=torch.int64).cuda())
    q_THd = randn(3, dtype, 241, 8, 128).cuda()
    found._flash = None
    want, got = found.paged_attention(q_THd, pool, layout, 1, meta, Scoring(0.1)), torch.zeros_like(q_THd)
    assert flash(q_THd, got, pool, layout, 1, meta, 0.1), "FlashInfer failed, see the log"
    near(torch.cat([got[:40], got[41:]]).cpu(), torch.cat([want[:40], want[41:]]).cpu(), dtype)


def test_pages_arrive_before_the_step_that_waits_for_them() -> None:
    """Pinned rows, others, and those that are on the device already."""
    from loray_kernels.cuda.launch import CupyLauncher
    from loray_kernels.cuda.upload import PageUploader

    device = torch.device("cuda")
    pool = torch.zeros(1 << 20, device=device)
    uploader = PageUploader(CupyLauncher(device), pool)
    rows_LE = randn(1, torch.float32, 2, 1 << 16)
    pieces = [PageCopy(i * 512, (127 - i) * 1024 + 3, 512) for i in range(128)]
    for n, rows in enumerate((rows_LE.pin_memory(), rows_LE + 1, (rows_LE + 2).to(device))):
        uploader.write(rows, [0, 1 << 18], pieces)
        uploader.wait()
        got = pool.cpu()
        for layer, offset in enumerate((0, 1 << 18)):
            for start, to, length in pieces:
                want = rows_LE[layer, start : start + length] + n
                assert torch.equal(got[offset + to : offset + to + length], want)


def test_a_recorded_step_gives_what_the_step_gives() -> None:
    device, ops = use_device(torch.device("cuda")), backend("cuda", "cuda")
    layout = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=2, head_dim=64)
    pool = randn(2, torch.bfloat16, 64 * layout.layer_share).cuda()
    table_VD = randn(3, torch.bfloat16, 100, 256).cuda()

    def forward(step: CapturedStep) -> Tensor:
        q_THd = torch.nn.functional.embedding(step.token_ids_S, table_VD).view(-1, 4, 64)
        store(ops, pool, layout, 0, q_THd[:, :2], q_THd[:, 2:], step.attention)
        return ops.paged_attention(q_THd, pool, layout, 0, step.attention, Scoring(0.125))

    graphs = ops.captured_decoding(forward, Decoding(layout, 3, 32, (), device))
    assert isinstance(graphs, DecodeGraphs)
    done = graphs.capture(CaptureLimits(600.0, 1 << 30), lambda progress: None)
    assert done.num_captured == done.num_wanted == 3 * 6  # sizes, kinds
    for contexts in ([40, 300, 7], [500], [3, 17, 90]):
        num, blocks = len(contexts), torch.randperm(64)[: 21 * len(contexts)].view(len(contexts), -1)
        blocks = blocks if num > 1 else torch.randperm(64)[None, :32]
        slots = [int(b[(c - 1) // 16]) * 16 + (c - 1) % 16 for b, c in zip(blocks, contexts, strict=True)]
        meta = AttentionMeta(tuple(range(num + 1)), tuple(contexts), tuple(blocks.cuda()), torch.tensor(slots).cuda())
        token_ids_S, positions_S = np.arange(num), np.array(contexts) - 1
        places = [32 * slot + i for slot in range(num) for i in range(blocks.shape[1])]
        none = np.array([], dtype=np.int64)
        step = DecodeStep(token_ids_S, positions_S, np.arange(num), none, places, blocks.flatten().tolist())
        tensors = (torch.from_numpy(a).cuda() for a in (token_ids_S, positions_S))
        near(graphs(step).cpu(), forward(CapturedStep(*tensors, meta, None)).cpu(), torch.bfloat16)
