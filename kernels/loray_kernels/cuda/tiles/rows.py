"""Rows of activations, in Triton: norms with weights of adapters, SwiGLU.

Values are rounded where the reference rounds them. Row offsets are as in `lora`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["num_rows", "num_segments"],
    do_not_specialize_on_alignment=["own_row", "offsets", "segments"],
)
def rms_norm(
    x,
    x_stride,
    added,
    added_stride,
    total,
    weight,
    y,
    num_heads,
    width,
    eps,
    own_row,
    pool,
    offsets,
    num_rows,
    segments,
    num_segments,
    ADD: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x / rms(x) · weight; a token's `own_row` is −1, or the row that is its weight. Grid (tokens × heads).

    With ADD the sum x + added takes the place of x, and is written to `total`.

    The sum is rounded to x's dtype, and the normalised value before it is multiplied with the weight, as in the
    reference.
    """
    token = (tl.program_id(0) // num_heads).to(tl.int64)
    head = tl.program_id(0) % num_heads
    e = tl.arange(0, BLOCK_D)
    mask = e < width
    value = tl.load(x + token * x_stride + head * width + e, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        more = tl.load(added + token * added_stride + head * width + e, mask=mask, other=0.0).to(tl.float32)
        rounded = (value + more).to(x.dtype.element_ty)
        tl.store(total + tl.program_id(0).to(tl.int64) * width + e, rounded, mask=mask)
        value = rounded.to(tl.float32)
    normal = (value * tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)).to(x.dtype.element_ty)
    w = tl.load(weight + e, mask=mask, other=0.0).to(tl.float32)
    if OWN:
        row = tl.load(own_row + token)
        if row >= 0:
            for s in range(num_segments):
                start = tl.load(segments + 2 * s)
                inside = (e >= start) & (e < start + tl.load(segments + 2 * s + 1))
                at = tl.load(offsets + s * num_rows + row)
                own = tl.load(pool + at + (e - start), mask=inside, other=0.0).to(tl.float32)
                w = tl.where(inside, own, w)
    result = w * normal.to(tl.float32)
    tl.store(y + tl.program_id(0).to(tl.int64) * width + e, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def silu_mul(gate_up, stride, y, width, BLOCK_M: tl.constexpr):
    """silu(gate) · up, the first factor rounded as in the reference. Grid (tokens, column tiles)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = column < width
    kind = y.dtype.element_ty
    gate = tl.load(gate_up + token * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * stride + width + column, mask=mask, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(y + token * width + column, (activated * up).to(kind), mask=mask)
