"""LoRA of many adapters in one pass, as two ops for each module whose backward passes add to the adapters' gradients.

Autograd sees no parameter: `anchor`, a scalar that requires a gradient and gets none, makes it call a backward pass
where an input needs no gradient, as in the first layer. Anomaly detection, torch.compile and second derivatives do not
work with ops that have such side effects. With non-reentrant checkpointing the forward pass runs twice, and the
backward pass, which alone has side effects, once.

Shapes: M tokens of a pass, N those of a bucket, R rank, I and O widths of a module, K modules with one input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loray.train.many.products import accumulate, add_product, multiply, scale_rows
from loray.train.many.rows import Part, Rows
from loray.train.many.stacks import Inputs


def add_lora(y_MO: Tensor, x: Tensor, x_MI: Tensor, rows: Rows, path: str, anchor: Tensor) -> Tensor:
    """Add s B A x of each adapter to the outputs of the module at `path`, in place. `x_MI` is its input `x`, flat."""
    if not (parts := rows.of(path, "lora", "dora")):
        return y_MO
    inner = inner_products(x, x_MI, rows, parts, path, anchor)
    result: Tensor = Expand.apply(y_MO, anchor, path, parts, *inner)  # type: ignore[no-untyped-call]
    return result


def inner_products(
    x: Tensor, x_MI: Tensor, rows: Rows, parts: Sequence[Part], path: str, anchor: Tensor
) -> list[Tensor]:
    """Compute A x of each part, (N, R), once for all modules that are given the same tensor `x`."""
    if rows.shared is None or rows.shared[0] is not x:
        rows.shared = (x, {})
    known = rows.shared[1]
    missing = [part for part in parts if (id(part), path) not in known]
    if missing:
        plan = [(part, part.bucket.inputs[path]) for part in missing]
        found: Sequence[Tensor] = Shrink.apply(x_MI, anchor, plan)  # type: ignore[no-untyped-call]
        known.update(zip(((id(part), p) for part, inputs in plan for p in inputs.paths), found, strict=True))
    return [known[id(part), path] for part in parts]


class Shrink(torch.autograd.Function):
    """x (M, I) → A x (N, R) of each part and module of its inputs. Adds to the gradients of A."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, anchor: Tensor, plan: Sequence[tuple[Part, Inputs]]) -> tuple[Tensor, ...]:
        ctx.plan = plan
        ctx.save_for_backward(x_MI)
        found: list[Tensor] = []
        for part, inputs in plan:
            assert inputs.a is not None
            h_NR = x_MI.new_empty(part.num_tokens, inputs.a.shape[0])
            a_SRI = part.bucket.weights(inputs.a)
            multiply(h_NR, _dropped(x_MI, part, inputs), a_SRI.mT, part)
            found += torch.split(h_NR, part.bucket.key.rank, dim=1)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_MI,) = ctx.saved_tensors
        dx_MI, at = None, 0
        if ctx.needs_input_grad[0]:
            is_whole = sum(part.num_tokens for part, _ in ctx.plan) == len(x_MI)
            dx_MI = torch.empty_like(x_MI) if is_whole else torch.zeros_like(x_MI)
        for part, inputs in ctx.plan:
            own = grads[at : at + len(inputs.paths)]
            at += len(own)
            dh_NR = own[0].contiguous() if len(own) == 1 else torch.cat(own, dim=1)
            accumulate(part.bucket.gradients(inputs.a), dh_NR, _dropped(x_MI, part, inputs), part, scaled=False)
            if dx_MI is not None:
                dx_NI = dx_MI[part.tokens]
                multiply(dx_NI, dh_NR, part.bucket.weights(inputs.a), part)
                if part.seeds:
                    dx_NI.copy_(part.drop(dx_NI, inputs.paths[0]))
        return dx_MI, None, None


def _dropped(x_MI: Tensor, part: Part, inputs: Inputs) -> Tensor:
    x_NI = x_MI[part.tokens]
    return part.drop(x_NI, inputs.paths[0]) if part.seeds else x_NI


class Expand(torch.autograd.Function):
    """y (M, O), A x (N, R) of each part → y + s B A x, in y's memory. Adds to the gradients of B."""

    @staticmethod
    def forward(ctx: Any, y_MO: Tensor, anchor: Tensor, path: str, parts: Sequence[Part], *inner: Tensor) -> Tensor:
        ctx.path, ctx.parts = path, parts
        ctx.save_for_backward(*inner)
        ctx.mark_dirty(y_MO)
        for part, h_NR in zip(parts, inner, strict=True):
            b_SOR = part.bucket.weights(part.bucket.pieces[part.bucket.name(path, "b")])
            add_product(y_MO[part.tokens], h_NR, b_SOR.mT, part)
        return y_MO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_MO = grads[0].contiguous()
        found: list[Tensor] = []
        for part, h_NR in zip(ctx.parts, ctx.saved_tensors, strict=True):
            bucket, grad_NO = part.bucket, grad_MO[part.tokens]
            piece = bucket.pieces[bucket.name(ctx.path, "b")]
            accumulate(bucket.gradients(piece), grad_NO, h_NR, part, scaled=True)
            dh_NR = torch.empty_like(h_NR, memory_format=torch.contiguous_format)
            multiply(dh_NR, grad_NO, bucket.weights(piece), part)
            scale_rows(dh_NR, part)
            found.append(dh_NR)
        return grad_MO, None, None, None, *found
