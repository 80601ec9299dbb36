"""Products of each adapter's rows with its own matrices.

Neighbours with as many tokens are one batched product; others are a product each. On a GPU in bf16 a bucket whose
adapters differ in their tokens is one grouped product.

Shapes: N tokens of a bucket, n those of one adapter, g adapters, S slots, K and P widths of a matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from loray.train.many.rows import Part


def each(x_NK: Tensor, num: int) -> Tensor:
    """View the rows of `num` adapters with as many each as (num, n, K)."""
    return x_NK.view(num, -1, x_NK.shape[-1])


def multiply(out_NP: Tensor, x_NK: Tensor, weights_SKP: Tensor, part: Part) -> None:
    """Set each adapter's rows of `out` to those of `x` times its matrix."""
    if part.groups is not None:
        out_NP.copy_(_grouped(x_NK, weights_SKP, part.groups.slots, part.groups.ends))
        return
    for tokens, slots, num, _ in part.runs:
        out, x = out_NP[tokens], x_NK[tokens]
        if num == 1:
            torch.mm(x, weights_SKP[slots.start], out=out)
        else:
            torch.bmm(each(x, num), weights_SKP[slots], out=each(out, num))


def add_product(out_NP: Tensor, x_NK: Tensor, weights_SKP: Tensor, part: Part) -> None:
    """Add to each adapter's rows of `out` those of `x` times its matrix times its scale."""
    if part.groups is not None:
        added_NP = _grouped(x_NK, weights_SKP, part.groups.slots, part.groups.ends)
        out_NP.copy_(out_NP + added_NP * part.groups.scales_N1)
        return
    for tokens, slots, num, scale in part.runs:
        out, x = out_NP[tokens], x_NK[tokens]
        if num == 1:
            torch.addmm(out, x, weights_SKP[slots.start], alpha=scale, out=out)
        else:
            torch.baddbmm(each(out, num), each(x, num), weights_SKP[slots], alpha=scale, out=each(out, num))


def scale_rows(x_NK: Tensor, part: Part) -> None:
    """Multiply each adapter's rows by its scale, in place."""
    for tokens, _, _, scale in part.runs:
        if scale != 1:
            x_NK[tokens] *= scale


def accumulate(gradient_SKP: Tensor, x_NK: Tensor, y_NP: Tensor, part: Part, *, scaled: bool) -> None:
    """Add to each adapter's gradient xᵀ y of its rows, times its scale if `scaled`.

    In 16 bits it is rounded before it is added, as the gradient of a micro-batch is where an adapter trains alone.
    """
    if part.groups is not None:
        ends = part.groups.ends
        products_gKP = F.grouped_mm(x_NK.t(), y_NP, offs=ends).to(gradient_SKP.dtype)
        if scaled:
            products_gKP = products_gKP * part.groups.scales_N1[ends.long() - 1, :, None]
        gradient_SKP.index_add_(0, part.groups.slots, products_gKP)
        return
    in_place = gradient_SKP.dtype == x_NK.dtype
    for tokens, slots, num, scale in part.runs:
        alpha, x, y = scale if scaled else 1.0, x_NK[tokens], y_NP[tokens]
        if num == 1 and in_place:
            gradient_SKP[slots.start].addmm_(x.t(), y, alpha=alpha)
        elif num == 1:
            gradient_SKP[slots.start].add_(x.t() @ y, alpha=alpha)
        elif in_place:
            gradient_SKP[slots].baddbmm_(each(x, num).mT, each(y, num), alpha=alpha)
        else:
            gradient_SKP[slots].add_(each(x, num).mT @ each(y, num), alpha=alpha)


# -- grouped products --


def has_grouped(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether grouped products are used: on a GPU in bf16, where a small one gives what single ones give. On a CPU
    torch has a loop for them.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    generator = torch.Generator().manual_seed(0)
    x_NK, weights_SKP = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((24, 16), (3, 16, 8)))
    ends, slots = torch.tensor([8, 24], dtype=torch.int32, device=device), torch.tensor([0, 2], device=device)
    expected = torch.cat([x_NK[:8] @ weights_SKP[0], x_NK[8:] @ weights_SKP[2]])
    try:
        found = _grouped(x_NK, weights_SKP, slots, ends)
        products = F.grouped_mm(x_NK.t(), found, offs=ends)
    except (RuntimeError, NotImplementedError):  # an older GPU, or a build without them
        return False
    pairs = (found, expected), (products[1], x_NK[8:].t() @ found[8:])
    return all(torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2) for ours, theirs in pairs)


def _grouped(x_NK: Tensor, weights_SKP: Tensor, slots: Tensor, ends: Tensor) -> Tensor:
    # What is gathered keeps the order of its axes in memory: a transposed view stays one.
    weights = weights_SKP.mT[slots].mT if weights_SKP.stride(-1) != 1 else weights_SKP[slots]
    return F.grouped_mm(x_NK, weights, offs=ends)
