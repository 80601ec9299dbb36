"""DoRA of many adapters in one pass: what `loray.methods.dora_module` computes, after LoRA's products.

Shapes: M tokens of a pass, N those of a bucket, g adapters of n tokens, O outputs of a module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from loray.bases.quantized import dequantized
from loray.methods.weights import changed_norms
from loray.train.many.products import each
from loray.train.many.rows import Part, Rows
from loray.train.many.stacks import Bucket


def scale_outputs(y_MO: Tensor, rows: Rows, path: str, module: Any, anchor: Tensor) -> Tensor:
    """Scale the outputs of the rows with DoRA by m / ‖W + s B A‖, but for the bias, in place.

    `module` has the base's linear layer as `base_layer` and the squares of its rows' norms as `initial_square_O`.
    """
    if not (parts := rows.of(path, "dora")):
        return y_MO
    result: Tensor = Scale.apply(y_MO, anchor, path, parts, module)  # type: ignore[no-untyped-call]
    return result


class Scale(torch.autograd.Function):
    """y (M, O) → y + (m / ν − 1) ⊙ (y − bias), in y's memory. Adds to the gradients of m.

    The norms ν are constants of the gradient (Liu et al., 2024, section 4.3). They are fp32, and computed once after
    each update. Kept for the backward pass is y as it was.
    """

    @staticmethod
    def forward(ctx: Any, y_MO: Tensor, anchor: Tensor, path: str, parts: Sequence[Part], module: Any) -> Tensor:
        ctx.path, ctx.parts, ctx.module = path, parts, module
        ctx.mark_dirty(y_MO)
        kept = [y_MO[part.tokens].clone() for part in parts]
        ctx.save_for_backward(*kept)
        for part in parts:
            y_NO = y_MO[part.tokens]
            for tokens, num, excess_gO, _ in _scales(part, path, module):
                y_gnO = each(y_NO[tokens], num)
                y_gnO.copy_(y_gnO.to(excess_gO.dtype) + excess_gO[:, None] * _plain(y_gnO, excess_gO, module))
        return y_MO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_MO = grads[0].clone(memory_format=torch.contiguous_format)
        for part, kept_NO in zip(ctx.parts, ctx.saved_tensors, strict=True):
            bucket, grad_NO = part.bucket, grad_MO[part.tokens]
            gradient_SO = bucket.gradients(bucket.pieces[bucket.name(ctx.path, "m")])
            runs = zip(part.runs, _scales(part, ctx.path, ctx.module), strict=True)
            for run, (tokens, num, excess_gO, norms_gO) in runs:
                exact_gnO = each(grad_NO[tokens], num).to(excess_gO.dtype)
                plain_gnO = _plain(each(kept_NO[tokens], num), excess_gO, ctx.module)
                gradient_SO[run.slots] += (exact_gnO * plain_gnO).sum(1) / norms_gO
                each(grad_NO[tokens], num).copy_(exact_gnO * (1 + excess_gO[:, None]))
        return grad_MO, None, None, None, None


def _scales(part: Part, path: str, module: Any) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """Yield the tokens and number of adapters of each run, m / ν − 1 as it is applied, and ν; both (g, O)."""
    bucket = part.bucket
    change_SO = bucket.weights(bucket.pieces[bucket.name(path, "m")])
    exact = torch.promote_types(change_SO.dtype, torch.float32)
    for tokens, slots, num, scale in part.runs:
        norms_gO = torch.stack([_norm(bucket, path, slot, scale, module) for slot in range(slots.start, slots.stop)])
        magnitude_gO = module.initial_square_O.sqrt() + change_SO[slots].to(exact)
        excess_gO = (magnitude_gO / norms_gO - 1).to(change_SO.dtype)
        yield tokens, num, excess_gO.to(exact), norms_gO


def _norm(bucket: Bucket, path: str, slot: int, scale: float, module: Any) -> Tensor:
    """Compute ‖W + s B A‖ of each row, (O,), where it is not known since the adapter's last update."""
    known = bucket.norms.get((path, slot))
    if known is None:
        inputs, rank = bucket.inputs[path], bucket.key.rank
        assert inputs.a is not None
        first = inputs.paths.index(path) * rank
        a_RI = bucket.weights(inputs.a)[slot, first : first + rank]
        b_OR = bucket.weights(bucket.pieces[bucket.name(path, "b")])[slot]
        known = changed_norms(dequantized(module.base_layer), module.initial_square_O, a_RI, b_OR, scale)
        bucket.norms[path, slot] = known
    return known


def _plain(y_gnO: Tensor, like: Tensor, module: Any) -> Tensor:
    bias = module.base_layer.bias
    y_gnO = y_gnO.to(like.dtype)
    return y_gnO if bias is None else y_gnO - bias.to(like.dtype)
