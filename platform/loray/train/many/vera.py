"""VeRA of many adapters in one pass. The products with the pair (A, B) are those of all adapters together.

As for LoRA (`loray.train.many.lora`), the backward pass adds to the adapters' gradients.

Shapes: M tokens of a pass, N those of a bucket, g adapters of n tokens, R rank, I and O widths of a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loray.train.many.products import each
from loray.train.many.rows import Part, Rows
from loray.train.many.stacks import Bucket, Piece


def add_vera(y_MO: Tensor, x: Tensor, x_MI: Tensor, rows: Rows, path: str, anchor: Tensor) -> Tensor:
    """Add b ⊙ B (d ⊙ A x) of each adapter to the outputs of the module at `path`, in place."""
    if not (parts := rows.of(path, "vera")):
        return y_MO
    if rows.shared is None or rows.shared[0] is not x:
        rows.shared = (x, {})
    inner, outer = [], []
    for part in parts:
        assert part.bucket.projection is not None
        a_RI, b_OR = part.bucket.projection.like(x_MI)
        inputs = part.bucket.inputs[path]
        u_NR = rows.shared[1].get((id(part), path))
        if u_NR is None:
            x_NI = x_MI[part.tokens]
            u_NR = F.linear(part.drop(x_NI, path) if part.seeds else x_NI, a_RI[:, : x_MI.shape[1]])
            rows.shared[1].update(dict.fromkeys(((id(part), p) for p in inputs.paths), u_NR))
        inner.append(u_NR)
        outer.append(b_OR[: y_MO.shape[1]])
    result: Tensor = VeraOuter.apply(y_MO, anchor, path, parts, outer, *inner)  # type: ignore[no-untyped-call]
    return result


class VeraOuter(torch.autograd.Function):
    """y (M, O), U = A x (N, R) of each part → y + b ⊙ (B (d ⊙ U)), in y's memory. Adds to the gradients of d and b.

    Only U is kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_MO: Tensor,
        anchor: Tensor,
        path: str,
        parts: Sequence[Part],
        outer: Sequence[Tensor],
        *inner: Tensor,
    ) -> Tensor:
        ctx.path, ctx.parts, ctx.outer = path, parts, outer
        ctx.save_for_backward(*inner)
        ctx.mark_dirty(y_MO)
        for part, b_OR, u_NR in zip(parts, outer, inner, strict=True):
            d_SR, b_SO = (part.bucket.weights(piece) for piece in _vectors(part.bucket, path))
            z_NO = F.linear(_times(u_NR, d_SR, part), b_OR)
            y_NO = y_MO[part.tokens]
            for tokens, slots, num, _ in part.runs:
                each(y_NO[tokens], num).addcmul_(each(z_NO[tokens], num), b_SO[slots][:, None])
        return y_MO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_MO = grads[0].contiguous()
        found: list[Tensor | None] = []
        for i, (part, b_OR, u_NR) in enumerate(zip(ctx.parts, ctx.outer, ctx.saved_tensors, strict=True)):
            d_SR, b_SO = (part.bucket.weights(piece) for piece in _vectors(part.bucket, ctx.path))
            dd_SR, db_SO = (part.bucket.gradients(piece) for piece in _vectors(part.bucket, ctx.path))
            grad_NO = grad_MO[part.tokens]
            _add_products(db_SO, grad_NO, F.linear(_times(u_NR, d_SR, part), b_OR), part)
            dv_NR = _times(grad_NO, b_SO, part) @ b_OR
            _add_products(dd_SR, dv_NR, u_NR, part)
            found.append(_times(dv_NR, d_SR, part) if ctx.needs_input_grad[5 + i] else None)
        return grad_MO, None, None, None, None, *found


def _vectors(bucket: Bucket, path: str) -> tuple[Piece, Piece]:
    """Find d and b of a module."""
    return bucket.pieces[bucket.name(path, "d")], bucket.pieces[bucket.name(path, "b")]


def _times(x_NR: Tensor, vectors_SR: Tensor, part: Part) -> Tensor:
    """Multiply each adapter's rows by its vector."""
    found = torch.empty_like(x_NR)
    for tokens, slots, num, _ in part.runs:
        x_gnR = each(x_NR[tokens], num)
        torch.mul(x_gnR, vectors_SR[slots][:, None], out=each(found[tokens], num))
    return found


def _add_products(gradient_SR: Tensor, x_NR: Tensor, y_NR: Tensor, part: Part) -> None:
    """Add to each adapter's gradient the sum of x ⊙ y over its rows."""
    product_NR = x_NR * y_NR
    for tokens, slots, num, _ in part.runs:
        product_gnR = each(product_NR[tokens], num)
        gradient_SR[slots].add_(product_gnR.sum(1, dtype=gradient_SR.dtype))
