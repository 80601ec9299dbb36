"""Attention of prompts over the paged cache, in Triton. `pool` points to the layer's share of the first block.

Shapes: Q queries of a tile, D head dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["items", "query_start", "context_len", "table_start", "blocks"])
def attention_prefill(
    q,
    q_stride,
    out,
    pool,
    block_stride,
    items,
    query_start,
    context_len,
    table_start,
    blocks,
    scale,
    BLOCK_TOKENS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Causal attention of a tile of one sequence's queries over its cache (FlashAttention-2, Dao, 2023).

    Keys are taken BLOCK_K at a time from position 0, so the result does not depend on the prompt's chunks. An item is
    (sequence, first query of the tile). Grid (items, heads).
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
    for j in range(0, last, BLOCK_K):
        key = j + tl.arange(0, BLOCK_K)
        key_mask = key < last
        block = tl.load(own_blocks + key // BLOCK_TOKENS, mask=key_mask, other=0)
        row = block * block_stride + (key % BLOCK_TOKENS * NUM_KV_HEADS + kv_head) * HEAD_DIM
        kv_mask = key_mask[:, None] & e_mask[None, :]
        k = tl.load(pool + row[:, None] + e[None, :], mask=kv_mask, other=0.0)
        score = tl.dot(query_QD, tl.trans(k), input_precision="tf32x3") * scale
        visible = key_mask[None, :] & (key[None, :] <= position[:, None])
        score = tl.where(visible, score, float("-inf"))
        larger = tl.maximum(top, tl.max(score, axis=1))
        # The maximum of a row that has seen no key yet is −inf, and −inf − −inf is NaN.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        factor = tl.exp(top - base)
        p = tl.exp(score - base[:, None])
        v_row = row + BLOCK_TOKENS * NUM_KV_HEADS * HEAD_DIM
        v = tl.load(pool + v_row[:, None] + e[None, :], mask=kv_mask, other=0.0)
        total = tl.dot(p.to(v.dtype), v, total * factor[:, None], input_precision="tf32x3")
        weight = weight * factor + tl.sum(p, axis=1)
        top = larger
    out_at = out + ((start + query)[:, None] * num_heads + head) * HEAD_DIM + e[None, :]
    result = total / tl.where(weight > 0, weight, 1.0)[:, None]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=query_mask[:, None] & e_mask[None, :])
