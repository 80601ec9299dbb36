"""LoRA, VeRA and prefill attention in Triton.

Row offsets are int64, in elements, for layer 0; `pool` points to the layer's share. A row in several segments of
columns has an offset in each: `offsets[segment · num_rows + row]`; `segments[segment]` is (first column, columns).

A product with an fp32 factor is three TF32 products of its parts (tf32x3), about as exact as fp32; 16-bit factors are
exact in TF32. Loads along a row are vectors if the offsets of all rows of the tile are multiples of 8 elements, else
single elements; the sums are the same. The compiler learns it from `at // 8 * 8`: a hint (`tl.multiple_of`) would hold
wherever the number is used, in the other branch too.

Numbers that vary with a step's adapters are not specialised on, nor is where its tables begin: each variant would be
compiled while a request waits.

Shapes: T tokens, I input width, O output width, R rows of A and B; Q queries of a tile, D head dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot32(a, b, accumulator):
    """accumulator + a b, with fp32 `a`."""
    return tl.dot(a, b.to(tl.float32), accumulator, input_precision="tf32x3")


@triton.jit
def _shrink_segment(
    total, x_rows, token_mask, a, at, row_mask, column, first, last, VECTOR: tl.constexpr, BLOCK_K: tl.constexpr
):
    """total_TR + x A.T over columns [first, last) of the segment that begins at `column`."""
    if VECTOR:
        at, column, first, last = at // 8 * 8, column // 8 * 8, first // 8 * 8, last // 8 * 8
    for k in range(first, last, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        inside = columns < last
        x_TK = tl.load(x_rows + (column + columns)[None, :], mask=token_mask[:, None] & inside[None, :], other=0.0)
        a_RK = tl.load(a + at[:, None] + columns[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0)
        total = tl.dot(x_TK, tl.trans(a_RK), total, input_precision="tf32x3")
    return total


@triton.jit
def _sum_columns(total, x_rows, token_mask, a, at, row_mask, column, first, last, BLOCK_K: tl.constexpr):
    """_shrink_segment for rows that are not in the pool (see ops.py), of which ones are made."""
    period, begin = ((-1 - at) >> 32).to(tl.int32), ((-1 - at) & 0xFFFFFFFF).to(tl.int32)
    for k in range(first, last, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        inside = columns < last
        x_TK = tl.load(x_rows + (column + columns)[None, :], mask=token_mask[:, None] & inside[None, :], other=0.0)
        is_summed = (columns[None, :] % period[:, None] == begin[:, None]) & row_mask[:, None]
        a_RK = tl.where(is_summed, 1.0, 0.0).to(a.dtype.element_ty)
        total = tl.dot(x_TK, tl.trans(a_RK), total, input_precision="tf32x3")
    return total


@triton.jit
def _sum_of_splits(total, partial, arrived, num_splits, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr):
    """The sum of all splits' `total` of a tile, in their order, and whether this block has it: the last that arrives.

    `partial` has room for a tile of each split. `arrived` is 0 before and after.
    """
    SIZE: tl.constexpr = BLOCK_T * BLOCK_R
    own = partial + tl.arange(0, BLOCK_T)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    tl.store(own + tl.program_id(2) * SIZE, total)
    tl.debug_barrier()  # all threads have stored before one of them says so
    is_last = tl.atomic_add(arrived, 1, sem="acq_rel") == num_splits - 1
    if is_last:
        total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for first in range(0, num_splits, 4):
            for i in tl.static_range(4):  # loads that do not wait for each other
                there = tl.full((BLOCK_T, BLOCK_R), first + i, tl.int32) < num_splits
                total += tl.load(own + (first + i) * SIZE, mask=there, other=0.0, cache_modifier=".cg")
        tl.store(arrived, 0)
    return total, is_last


@triton.jit(
    do_not_specialize=["num_rows", "num_segments", "h_stride", "split_columns"],
    do_not_specialize_on_alignment=["items", "row_start", "offsets", "segments", "h_column"],
)
def lora_shrink(
    x,
    x_stride,
    pool,
    items,
    row_start,
    offsets,
    num_rows,
    segments,
    num_segments,
    h_column,
    h,
    h_stride,
    split_columns,
    partial,
    arrived,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h[t, h_column[r]] = A[r] · x[t], fp32. An item is (adapter, first token, tokens); an adapter's rows are those of
    all modules of the input. Grid (items, tiles of the largest number of rows, splits of `split_columns` of the input).

    With several splits, `partial` has (items, tiles, splits, BLOCK_T, BLOCK_R) numbers and `arrived` a zero for each of
    (items, tiles). A sum has the same order whatever the step has beside it.
    """
    item = items + 3 * tl.program_id(0)
    adapter = tl.load(item)
    token = tl.load(item + 1) + tl.arange(0, BLOCK_T)
    token_mask = tl.arange(0, BLOCK_T) < tl.load(item + 2)
    first = tl.load(row_start + adapter) + tl.program_id(1) * BLOCK_R
    last = tl.load(row_start + adapter + 1)
    if first < last:
        row = first + tl.arange(0, BLOCK_R)
        row_mask = row < last
        begin = tl.program_id(2) * split_columns
        total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        x_rows = x + token[:, None] * x_stride
        for s in range(num_segments):
            column = tl.load(segments + 2 * s)
            width = tl.load(segments + 2 * s + 1)
            at = tl.load(offsets + s * num_rows + row, mask=row_mask, other=0)
            start = tl.maximum(begin - column, 0)
            stop = tl.minimum(begin + split_columns - column, width)
            if tl.min(at, axis=0) < 0:
                total = _sum_columns(total, x_rows, token_mask, pool, at, row_mask, column, start, stop, BLOCK_K)
            elif tl.max(at % 8, axis=0) + width % 8 + column % 8 == 0:
                total = _shrink_segment(
                    total, x_rows, token_mask, pool, at, row_mask, column, start, stop, True, BLOCK_K
                )
            else:
                total = _shrink_segment(
                    total, x_rows, token_mask, pool, at, row_mask, column, start, stop, False, BLOCK_K
                )
        num_splits = tl.num_programs(2)
        is_last = num_splits == 1
        if num_splits > 1:
            tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            at_tile = partial + tile.to(tl.int64) * num_splits * BLOCK_T * BLOCK_R
            total, is_last = _sum_of_splits(total, at_tile, arrived + tile, num_splits, BLOCK_T, BLOCK_R)
        if is_last:
            to = tl.load(h_column + row, mask=row_mask, other=0)
            tl.store(h + token[:, None] * h_stride + to[None, :], total, mask=token_mask[:, None] & row_mask[None, :])


@triton.jit(
    do_not_specialize=["num_adapters", "h_stride"],
    do_not_specialize_on_alignment=["h", "items", "tiles", "offsets", "rank_start", "scale", "h_column"],
)
def lora_expand(
    y0,
    y1,
    y2,
    stride0,
    stride1,
    stride2,
    h,
    h_stride,
    pool,
    items,
    tiles,
    offsets,
    rank_start,
    num_adapters,
    scale,
    h_column,
    VECTOR_Y: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """y[t, o] += scale · Σ_r h[t, r] B[r, o], rounded once. A tile is (module, where its rows' offsets start, first
    column in the segment, first column in y, columns). Grid (items, tiles of all modules of the input).

    VECTOR_Y: outputs, their strides and the tiles' columns are multiples of 8 elements.
    """
    item = items + 3 * tl.program_id(0)
    adapter = tl.load(item)
    token = tl.load(item + 1) + tl.arange(0, BLOCK_T)
    token_mask = tl.arange(0, BLOCK_T) < tl.load(item + 2)
    tile = tiles + 5 * tl.program_id(1)
    module = tl.load(tile)
    first = tl.load(rank_start + module * (num_adapters + 1) + adapter)
    rank = tl.load(rank_start + module * (num_adapters + 1) + adapter + 1) - first
    if rank > 0:
        at_start = offsets + tl.load(tile + 1) + first
        from_column = tl.load(tile + 2)
        num_columns = tl.load(tile + 4)
        columns = tl.arange(0, BLOCK_O)
        inside = columns < num_columns
        h_rows = h + token[:, None] * h_stride + tl.load(h_column + module)
        total = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
        for r in range(0, rank, BLOCK_R):
            ranks = r + tl.arange(0, BLOCK_R)
            rank_mask = ranks < rank
            hidden = tl.load(h_rows + ranks[None, :], mask=token_mask[:, None] & rank_mask[None, :], other=0.0)
            at = tl.load(at_start + ranks, mask=rank_mask, other=0) + tl.where(rank_mask, from_column, 0)
            if tl.max(at % 8, axis=0) + num_columns % 8 == 0:
                b_mask = rank_mask[:, None] & (columns < num_columns // 8 * 8)[None, :]
                b = tl.load(pool + (at // 8 * 8)[:, None] + columns[None, :], mask=b_mask, other=0.0)
            else:
                b_mask = rank_mask[:, None] & inside[None, :]
                b = tl.load(pool + at[:, None] + columns[None, :], mask=b_mask, other=0.0)
            total = _dot32(hidden, b, total)
        y, stride = y0, tl.cast(stride0, tl.int64)
        if module == 1:
            y, stride = y1, tl.cast(stride1, tl.int64)
        elif module == 2:
            y, stride = y2, tl.cast(stride2, tl.int64)
        y_column = tl.load(tile + 3)
        if VECTOR_Y:
            stride, y_column = tl.multiple_of(stride, 8), tl.multiple_of(y_column, 8)
            inside = columns < tl.multiple_of(num_columns, 8)
        to = y + token[:, None] * stride + (y_column + columns)[None, :]
        mask = token_mask[:, None] & inside[None, :]
        before = tl.load(to, mask=mask, other=0.0).to(tl.float32)
        after = before + tl.load(scale + module * num_adapters + adapter) * total
        tl.store(to, after.to(y0.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["num_tokens", "num_d_segments", "num_b_segments"],
    do_not_specialize_on_alignment=["d_offsets", "d_segments", "b_offsets", "b_segments"],
)
def vera_expand(
    y,
    y_stride,
    z,
    z_stride,
    num_tokens,
    width,
    b_matrix,
    b_stride,
    pool,
    d_offsets,
    d_segments,
    num_d_segments,
    b_offsets,
    b_segments,
    num_b_segments,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """y[t] += b[t] ⊙ (B (d[t] ⊙ z[t])) with each token's own d and b. Grid (token tiles, column tiles)."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    token_mask = token < num_tokens
    column = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    column_mask = column < width
    total = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for s in range(num_d_segments):
        start = tl.load(d_segments + 2 * s)
        length = tl.load(d_segments + 2 * s + 1)
        at = tl.load(d_offsets + s * num_tokens + token, mask=token_mask, other=0)
        for r in range(0, length, BLOCK_R):
            ranks = r + tl.arange(0, BLOCK_R)
            rank_mask = ranks < length
            mask = token_mask[:, None] & rank_mask[None, :]
            d = tl.load(pool + at[:, None] + ranks[None, :], mask=mask, other=0.0).to(tl.float32)
            hidden = tl.load(z + token[:, None] * z_stride + start + ranks[None, :], mask=mask, other=0.0)
            b_at = b_matrix + column[None, :].to(tl.int64) * b_stride + start + ranks[:, None]
            b = tl.load(b_at, mask=rank_mask[:, None] & column_mask[None, :], other=0.0)
            total = tl.dot((hidden * d).to(b.dtype), b, total, input_precision="tf32x3")
    own = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for s in range(num_b_segments):
        start = tl.load(b_segments + 2 * s)
        length = tl.load(b_segments + 2 * s + 1)
        at = tl.load(b_offsets + s * num_tokens + token, mask=token_mask, other=0)
        inside = (column >= start) & (column < start + length)
        mask = token_mask[:, None] & inside[None, :]
        own += tl.load(pool + at[:, None] + (column - start)[None, :], mask=mask, other=0.0).to(tl.float32)
    to = y + token[:, None] * y_stride + column[None, :]
    mask = token_mask[:, None] & column_mask[None, :]
    before = tl.load(to, mask=mask, other=0.0).to(tl.float32)
    tl.store(to, (before + total * own).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["items", "query_start", "context_len", "table_start", "blocks"])
def attention_prefill(
    q,
    q_stride,
    out,
    pool,
    scales,
    block_stride,
    items,
    query_start,
    context_len,
    table_start,
    blocks,
    scale,
    window,
    soft_cap,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_INT8: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Causal attention of a tile of one sequence's queries over its cache (FlashAttention-2, Dao, 2023).

    Keys are taken BLOCK_K at a time from position 0, so the result does not depend on the prompt's chunks; what no
    query of a tile has in its window is left out, which changes no bits. An item is (sequence, first query of the
    tile). Grid (items, heads).

    IS_INT8: `pool` has int8, which are multiplied as they are; their scales, in `scales`, multiply scores and weights.
    That is the pool in fp32.
    """
    sequence = tl.load(items + 2 * tl.program_id(0))
    head = tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(1)
    start = tl.load(query_start + sequence)
    num_queries = tl.load(query_start + sequence + 1) - start
    context = tl.load(context_len + sequence)
    query = tl.load(items + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK_Q)
    query_mask = query < num_queries
    position = context - num_queries + query
    e = tl.arange(0, BLOCK_D)
    e_mask = e < HEAD_DIM
    q_at = q + (start + query)[:, None] * q_stride + head * HEAD_DIM + e[None, :]
    query_QD = tl.load(q_at, mask=query_mask[:, None] & e_mask[None, :], other=0.0)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_Q,), tl.float32)
    total = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    own_blocks = blocks + tl.load(table_start + sequence)
    kv_head = head // GROUP
    last = tl.minimum(context, tl.max(tl.where(query_mask, position, 0), axis=0) + 1)
    behind = 0
    if HAS_WINDOW:
        first = context - num_queries + tl.load(items + 2 * tl.program_id(0) + 1)
        behind = tl.maximum(first - window + 1, 0)
    for j in range(behind // BLOCK_K * BLOCK_K, last, BLOCK_K):
        key = j + tl.arange(0, BLOCK_K)
        key_mask = key < last
        if HAS_WINDOW:  # what is behind may be others' by now, and no number
            key_mask = key_mask & (key >= behind)
        block = tl.load(own_blocks + key // BLOCK_TOKENS, mask=key_mask, other=0)
        row = block * block_stride + (key % BLOCK_TOKENS * NUM_KV_HEADS + kv_head) * HEAD_DIM
        kv_mask = key_mask[:, None] & e_mask[None, :]
        k = tl.load(pool + row[:, None] + e[None, :], mask=kv_mask, other=0.0)
        if IS_INT8:
            k = k.to(tl.float32).to(query_QD.dtype)
        score = tl.dot(query_QD, tl.trans(k), input_precision="tf32x3") * scale
        if IS_INT8:
            scale_row = (block * block_stride + 2 * BLOCK_TOKENS * NUM_KV_HEADS * HEAD_DIM) // 4
            scale_at = scales + scale_row + kv_head * BLOCK_TOKENS + key % BLOCK_TOKENS
            score *= tl.load(scale_at, mask=key_mask, other=0.0)[None, :]
        if HAS_CAP:
            score = soft_cap * (1 - 2 / (tl.exp(2 / soft_cap * score) + 1))
        visible = key_mask[None, :] & (key[None, :] <= position[:, None])
        if HAS_WINDOW:
            visible = visible & (key[None, :] > position[:, None] - window)
        score = tl.where(visible, score, float("-inf"))
        larger = tl.maximum(top, tl.max(score, axis=1))
        # The maximum of a row that has seen no key yet is −inf, and −inf − −inf is NaN.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        factor = tl.exp(top - base)
        p = tl.exp(score - base[:, None])
        v_row = row + BLOCK_TOKENS * NUM_KV_HEADS * HEAD_DIM
        v = tl.load(pool + v_row[:, None] + e[None, :], mask=kv_mask, other=0.0)
        weight = weight * factor + tl.sum(p, axis=1)
        if IS_INT8:
            v = v.to(tl.float32).to(query_QD.dtype)
            p *= tl.load(scale_at + NUM_KV_HEADS * BLOCK_TOKENS, mask=key_mask, other=0.0)[None, :]
        total = tl.dot(p.to(v.dtype), v, total * factor[:, None], input_precision="tf32x3")
        top = larger
    out_at = out + ((start + query)[:, None] * num_heads + head) * HEAD_DIM + e[None, :]
    result = total / tl.where(weight > 0, weight, 1.0)[:, None]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=query_mask[:, None] & e_mask[None, :])
