"""Attention on a CPU, forward and backward, as one node of the autograd graph.

With `scaled_dot_product_attention`, autograd sees a slice for each run of heads and each stretch of segments. The
gradient of a slice is a tensor of full size, mostly zeros, and autograd adds them all. Here every gradient is written
once, to its place.

Shapes: B rows, T positions, H query heads, K key-value heads, R query heads of one, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loray.train.attention.cuts import Segments
from loray.train.attention.runs import Run, blocks, num_covered, take
from loray_kernels.cpu.causal import causal_backward, causal_forward


def attend_runs(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, runs: Sequence[Run], scale: float | None) -> Tensor:
    out_BTHD: Tensor = _Attend.apply(q_BHTD, k_BKTD, v_BKTD, runs, scale)  # type: ignore[no-untyped-call]
    return out_BTHD


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, runs: Sequence[Run], scale: float | None
    ) -> Tensor:
        out_BHTD = _for_queries(q_BHTD, runs)
        lses = []
        for run in runs:
            q, k, v, out = _taken(run, (q_BHTD, run.q), (k_BKTD, run.kv), (v_BKTD, run.kv), (out_BHTD, run.q))
            for block in blocks(run.segments):
                folded_q = block.fold(q, run.repeats)
                folded_k, folded_v = (block.fold(x, 1)[:, 0] for x in (k, v))
                folded, lse = causal_forward(folded_q, folded_k, folded_v, scale)
                for place, part in zip(block.views(out, run.repeats), block.unfold(folded, len(out)), strict=True):
                    place.copy_(part)
                lses.append(lse)
            _write_back(out_BHTD[:, run.q], out, run.segments)
        out_BTHD = out_BHTD.transpose(1, 2)
        ctx.save_for_backward(q_BHTD, k_BKTD, v_BKTD, out_BTHD, *lses)
        ctx.runs, ctx.scale = runs, scale
        return out_BTHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_BHTD, k_BKTD, v_BKTD, out_BTHD, *lses = ctx.saved_tensors
        out_BHTD, dout_BHTD = out_BTHD.transpose(1, 2), grads[0].transpose(1, 2)
        dq_BHTD, dk_BKTD, dv_BKTD = _for_queries(q_BHTD, ctx.runs), _zeros(k_BKTD), _zeros(v_BKTD)
        for run in ctx.runs:
            q, out, dout, dq = _taken(run, *((x, run.q) for x in (q_BHTD, out_BHTD, dout_BHTD, dq_BHTD)))
            k, v, dk, dv = _taken(run, *((x, run.kv) for x in (k_BKTD, v_BKTD, dk_BKTD, dv_BKTD)))
            for block in blocks(run.segments):
                folded_dout, folded_q, folded_out = (block.fold(x, run.repeats) for x in (dout, q, out))
                folded_k, folded_v = (block.fold(x, 1)[:, 0] for x in (k, v))
                folded_dq, *folded_dkv = causal_backward(
                    folded_dout, folded_q, folded_k, folded_v, folded_out, lses.pop(0), ctx.scale
                )
                for place, part in zip(block.views(dq, run.repeats), block.unfold(folded_dq, len(dq)), strict=True):
                    place.copy_(part)
                for x, folded in zip((dk, dv), folded_dkv, strict=True):
                    parts = block.unfold(folded[:, None], len(x))
                    for place, part in zip(block.views(x, 1), parts, strict=True):
                        place.add_(part)
            _write_back(dq_BHTD[:, run.q], dq, run.segments)
            _write_back(dk_BKTD[:, run.kv], dk, run.segments)
            _write_back(dv_BKTD[:, run.kv], dv, run.segments)
        return dq_BHTD, dk_BKTD, dv_BKTD, None, None


def _taken(run: Run, *tensors_and_heads: tuple[Tensor, slice]) -> list[Tensor]:
    return [take(x_BhTD[:, heads], run.segments) for x_BhTD, heads in tensors_and_heads]


def _write_back(x_BhTD: Tensor, taken: Tensor, segments: Segments) -> None:
    """Write the result of `take` to its positions in `x_BhTD`, unless it is a view of them."""
    if segments.order_N is not None:
        x_BThD = x_BhTD.transpose(1, 2)
        x_BThD.view(-1, *x_BThD.shape[2:]).index_copy_(0, segments.order_N, taken[0].transpose(0, 1))


def _for_queries(q_BHTD: Tensor, runs: Sequence[Run]) -> Tensor:
    """A tensor like the queries: zeros where the segments do not cover all positions, else uninitialised."""
    num_rows, num_heads, num_tokens, width = q_BHTD.shape
    if any(run.segments.order_N is not None or num_covered(run.segments) < num_tokens for run in runs):
        return _zeros(q_BHTD)
    return q_BHTD.new_empty(num_rows, num_tokens, num_heads, width).transpose(1, 2)


def _zeros(x_BhTD: Tensor) -> Tensor:
    """Zeros (B, h, T, D) in the memory layout (B, T, h, D), which projections and RoPE also use for their gradients."""
    num_rows, num_heads, num_tokens, width = x_BhTD.shape
    return x_BhTD.new_zeros(num_rows, num_tokens, num_heads, width).transpose(1, 2)
