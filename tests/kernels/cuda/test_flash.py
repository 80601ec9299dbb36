"""What FlashInfer is asked for, against what its documentation says; compared on a card by test_gpu."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from loray_kernels import AttentionMeta, KvLayout, Scoring
from loray_kernels.cuda.flash import FlashPrompts
from tests.kernels.cuda.cases import REFERENCE, near, randn

LAYOUT = KvLayout(num_layers=2, block_tokens=16, num_kv_heads=2, head_dim=64)
NUM_BLOCKS, NUM_HEADS = 24, 4
CPU = torch.device("cpu")


class Wrapper:
    """BatchPrefillWithPagedKVCacheWrapper as version 0.7 documents it: plan with host tensors, run over pages."""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD"
        self.num_plans = 0

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        disable_split_kv: bool,
    ) -> None:
        tensors = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(t.dtype == torch.int32 and t.dim() == 1 for t in tensors)
        assert len(qo_indptr) == len(paged_kv_indptr) == len(paged_kv_last_page_len) + 1
        assert int(qo_indptr[0]) == int(paged_kv_indptr[0]) == 0
        assert int(paged_kv_indptr[-1]) == len(paged_kv_indices)
        assert all(1 <= n <= page_size for n in paged_kv_last_page_len.tolist())
        assert (num_qo_heads, num_kv_heads, head_dim_qk, page_size) == (NUM_HEADS, *LAYOUT[2:4], LAYOUT.block_tokens)
        assert causal
        assert disable_split_kv
        assert q_data_type == kv_data_type == torch.bfloat16
        self._plan, self._scale = tensors, sm_scale
        self.num_plans += 1

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor | None = None) -> Tensor:
        """Each sequence's keys are its pages, the last one cut; query i of n sees all but the last n − i − 1."""
        k, v = paged_kv_cache
        assert k.shape == v.shape == (NUM_BLOCKS, LAYOUT.block_tokens, LAYOUT.num_kv_heads, LAYOUT.head_dim)
        assert k.stride() == v.stride()
        assert k.stride(3) == 1
        qo, kv, indices, last = (t.tolist() for t in self._plan)
        assert q.shape == (qo[-1], NUM_HEADS, LAYOUT.head_dim)
        out = torch.empty_like(q) if out is None else out
        for i, length in enumerate(last):
            pages = indices[kv[i] : kv[i + 1]]
            context = (len(pages) - 1) * LAYOUT.block_tokens + length
            keys, values = (t[pages].flatten(0, 1)[:context].float() for t in (k, v))
            queries = q[qo[i] : qo[i + 1]].float()
            for head in range(NUM_HEADS):
                own = head * LAYOUT.num_kv_heads // NUM_HEADS
                scores = queries[:, head] @ keys[:, own].T * self._scale
                seen = torch.ones_like(scores).tril(context - len(queries)).bool()
                weights = scores.masked_fill(~seen, -torch.inf).softmax(1)
                out[qo[i] : qo[i + 1], head] = (weights @ values[:, own]).to(out.dtype)
        return out


def step(lengths: tuple[int, ...], contexts: tuple[int, ...]) -> tuple[Tensor, Tensor, AttentionMeta]:
    pool = randn(1, torch.bfloat16, NUM_BLOCKS * LAYOUT.num_layers * LAYOUT.layer_share)
    blocks = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(2)).split(4)
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    q_THd = randn(3, torch.bfloat16, starts[-1], NUM_HEADS, LAYOUT.head_dim)
    slots = torch.zeros(starts[-1], dtype=torch.int64)
    return pool, q_THd, AttentionMeta(tuple(starts), contexts, tuple(blocks[: len(lengths)]), slots)


@pytest.mark.parametrize(
    ("lengths", "contexts"), [((5, 33), (5, 50)), ((1, 7, 1, 20, 2), (40, 16, 1, 64, 3))], ids=["prompts", "mixed"]
)
def test_prompts_are_those_of_the_reference(lengths: tuple[int, ...], contexts: tuple[int, ...]) -> None:
    """Contexts that end in the middle of a page and at its end; rows that decode are left alone. One plan a step."""
    flash = FlashPrompts(Wrapper, CPU)
    for num_steps in (1, 2):
        pool, q_THd, meta = step(lengths, contexts)
        for layer in range(LAYOUT.num_layers):
            out_THd = torch.zeros_like(q_THd)
            assert flash(q_THd, out_THd, pool, LAYOUT, layer, meta, 0.25)
            want = REFERENCE.paged_attention(q_THd, pool, LAYOUT, layer, meta, Scoring(0.25))
            for start, length in zip(meta.query_start, lengths, strict=False):
                own = slice(start, start + length)
                near(out_THd[own], want[own] if length > 1 else torch.zeros_like(want[own]), torch.bfloat16)
        assert flash._wrapper.num_plans == num_steps


def test_a_layer_may_scale_otherwise() -> None:
    flash = FlashPrompts(Wrapper, CPU)
    pool, q_THd, meta = step((5, 33), (5, 50))
    for layer, scale in enumerate((0.25, 0.5)):
        out_THd = torch.zeros_like(q_THd)
        assert flash(q_THd, out_THd, pool, LAYOUT, layer, meta, scale)
        near(out_THd, REFERENCE.paged_attention(q_THd, pool, LAYOUT, layer, meta, Scoring(scale)), torch.bfloat16)


def test_where_it_fails_our_kernels_go_on(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Wrapper):
        def plan(self, *arguments: Any, **named: Any) -> None:
            raise RuntimeError("nvcc is missing")

    flash = FlashPrompts(Broken, CPU)
    pool, q_THd, meta = step((5, 6), (5, 6))
    for _ in range(2):
        assert not flash(q_THd, torch.zeros_like(q_THd), pool, LAYOUT, 0, meta, 0.25)
    assert caplog.text.count("nvcc is missing") == 1


def test_other_dtypes_and_heads_are_not_for_it() -> None:
    flash = FlashPrompts(Wrapper, CPU)
    pool, q_THd, meta = step((5, 6), (5, 6))
    assert not flash(q_THd.float(), q_THd.float(), pool, LAYOUT, 0, meta, 0.25)
    assert not flash(q_THd, q_THd, pool, LAYOUT._replace(head_dim=48), 0, meta, 0.25)


def test_the_installed_one_takes_these_arguments() -> None:
    flashinfer = pytest.importorskip("flashinfer", reason="FlashInfer cannot be imported here")
    theirs = flashinfer.BatchPrefillWithPagedKVCacheWrapper
    for name in ("plan", "run"):
        known = inspect.signature(getattr(theirs, name)).parameters
        assert set(inspect.signature(getattr(Wrapper, name)).parameters) <= set(known)
