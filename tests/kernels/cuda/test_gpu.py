"""The cuda backend on a GPU: the tests of every backend, its own, adapters beside the steps, recorded steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loray_kernels import AttentionMeta, KvLayout, LoraTable, Ops, RowTables, Segments, TokenRows, VeraTable, backend
from tests.kernels.cuda.cases import *  # noqa: F403
from tests.kernels.cuda.cases import near, randn
from tests.kernels.test_ops import *  # noqa: F403

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def moved(value: Any, device: str) -> Any:
    """The same value with its tensors on `device`."""
    match value:
        case Tensor():
            return value.to(device)
        case LoraTable():
            return LoraTable(moved(value.a, device), moved(value.b, device), value.rank_start, value.scale)
        case VeraTable():
            fields = (moved(v, device) for v in (value.a_RI, value.b_OR, value.d, value.b))
            return VeraTable(*fields, value.start, value.stop)
        case TokenRows():
            return TokenRows(moved(value.tokens_N, device), moved(value.rows, device))
        case RowTables():
            return RowTables(tuple((c, w, moved(o, device)) for c, w, o in value.segments))
        case AttentionMeta():
            tables = tuple(moved(t, device) for t in value.block_table)
            return AttentionMeta(value.query_start, value.context_len, tables, moved(value.slots_T, device))
        case Segments():
            return Segments(value.start, value.stop)
        case tuple() if not isinstance(value, KvLayout):
            return tuple(moved(v, device) for v in value)
    return value


class OnGpu:
    """Ops for tensors on the CPU: arguments go over, what an op writes comes back."""

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
                    if isinstance(a, Tensor) and name in ("write_kv", "lora_expand", "vera_expand"):
                        a.copy_(b)
            return result

        return call


@pytest.fixture(scope="module")
def ops() -> Any:
    return OnGpu(backend("cuda", "cuda"))


def test_pages_arrive_before_the_step_that_waits_for_them() -> None:
    from loray_kernels.cuda.gather import Gather
    from loray_kernels.cuda.launch import CupyLauncher
    from loray_kernels.cuda.pages import PageUploader, Piece

    device = torch.device("cuda")
    pool, pages = torch.zeros(1 << 20, device=device), randn(1, torch.float32, 1 << 16).pin_memory()
    pieces = [Piece(i * 512, (127 - i) * 1024 + 3, 512) for i in range(128)]
    event = PageUploader(Gather(CupyLauncher(device)), device).place(pool, pages, pieces)
    torch.cuda.current_stream().wait_event(event)
    for piece in pieces:
        assert torch.equal(pool[piece.to : piece.to + piece.length].cpu(), pages[piece.start :][: piece.length])


def test_a_recorded_step_gives_what_the_step_gives() -> None:
    from loray_kernels.cuda.graphs import DecodeGraphs, DecodeStep

    device, ops = torch.device("cuda"), backend("cuda", "cuda")
    layout = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=2, head_dim=64)
    pool = randn(2, torch.bfloat16, 64 * layout.layer_share).cuda()
    table_VD = randn(3, torch.bfloat16, 100, 256).cuda()

    def forward(step: DecodeStep) -> Tensor:
        q_THd = torch.nn.functional.embedding(step.token_ids_S, table_VD).view(-1, 4, 64)
        ops.write_kv(pool, layout, 0, q_THd[:, :2], q_THd[:, 2:], step.attention)
        return ops.paged_attention(q_THd, pool, layout, 0, step.attention, 0.125)

    graphs = DecodeGraphs(forward, layout, 32, device)
    for contexts in ([40, 300, 7], [500], [3, 17, 90]):
        blocks = torch.randperm(64)[: 32 * len(contexts)].view(len(contexts), -1)[:, :32].cuda()
        slots = [int(b[(c - 1) // 16]) * 16 + (c - 1) % 16 for b, c in zip(blocks, contexts, strict=True)]
        starts = tuple(range(len(contexts) + 1))
        meta = AttentionMeta(starts, tuple(contexts), tuple(blocks), torch.tensor(slots).cuda())
        step = DecodeStep(torch.arange(len(contexts)).cuda(), torch.tensor(contexts).cuda() - 1, meta)
        near(graphs(step).cpu(), forward(step).cpu(), torch.bfloat16)
