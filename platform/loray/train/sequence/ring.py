"""Dense causal attention over a sequence group, for evaluation: ring attention (Liu et al., 2023).

Rank r attends to the keys and values of ranks r, r − 1, …, 0, its own first, and merges the results by log-sum-exp, as
flash attention does. It needs none of later ranks, so that the ring is open: rank r sends r + 1 times, and the last
rank never. Supports any numbers of heads, rows of several documents, and padding.

Shapes: B rows, H query heads, K key-value heads, R = H/K, N positions of a whole row, L of one rank, A of those in a
document that begins on an earlier rank, S keys, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from loray.errors import UnsupportedError
from loray.train.attention.cuts import Segments, filled, find_segments, ordered, uniform
from loray.train.attention.shifted import attend_heads
from loray.train.sequence.group import Pending, SequenceGroup, post
from loray.train.sequence.shard import active_shard

RING = "ring"


class Continued(NamedTuple):
    """Rows whose first `length` local positions are in a document that begins on an earlier rank, at `start`."""

    rows: list[int] | slice
    start: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class RingCuts:
    """`local` are the documents that begin on this rank, `continued` the others."""

    group: SequenceGroup
    row_length: int
    continued: tuple[Continued, ...]
    local: Segments


def ring_cuts(document_ids_BN: Tensor, group: SequenceGroup, *, device: torch.device | str = "cpu") -> RingCuts:
    """Cuts on `group.rank`, from the document ids of whole rows (on the CPU; −1 is padding)."""
    row_length = document_ids_BN.shape[1]
    length = row_length // group.size
    first = group.rank * length
    ids_BL = document_ids_BN[:, first : first + length]
    rows_of: dict[tuple[int, int], list[int]] = {}
    if first:
        is_same_BN = document_ids_BN == ids_BL[:, :1]
        for row, is_same_N in enumerate(is_same_BN):
            if int(ids_BL[row, 0]) >= 0 and bool(is_same_N[first - 1]):
                before, after = is_same_N[:first].flip(0), is_same_N[first : first + length]
                key = first - _leading(before), _leading(after)
                rows_of.setdefault(key, []).append(row)
    num_rows = len(document_ids_BN)
    continued = tuple(Continued(rows if len(rows) < num_rows else slice(None), *k) for k, rows in rows_of.items())
    num_filled = filled(ids_BL)
    if not continued and num_filled is not None:
        return RingCuts(group, row_length, continued, uniform(num_filled, length, 0))
    begin_S, length_S = find_segments(ids_BL, length, 0)
    elsewhere = torch.tensor([row * length for rows in rows_of.values() for row in rows], dtype=torch.long)
    keep_S = ~torch.isin(begin_S, elsewhere)
    return RingCuts(group, row_length, continued, ordered(begin_S[keep_S], length_S[keep_S], device))


def _leading(flags_N: Tensor) -> int:
    """The number of True values before the first False."""
    return int(flags_N.long().cumprod(0).sum())


def ring_attention(
    q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, cuts: RingCuts, *, scale: float | None = None
) -> Tensor:
    """→ (B, L, H, D), without gradients. A collective call of `cuts.group`."""
    group, length = cuts.group, k_BKLD.shape[2]
    repeats = q_BHLD.shape[1] // k_BKLD.shape[1]
    held = torch.stack([k_BKLD, v_BKLD])
    merged: list[_Partial | None] = [None] * len(cuts.continued)
    for owner in range(group.rank, -1, -1):
        pending, coming = _pass_on(held, owner, group)
        for i, part in enumerate(cuts.continued):
            keys = slice(max(0, part.start - owner * length), length if owner < group.rank else part.length)
            if keys.start < keys.stop:
                q_bHAD, (k_bKSD, v_bKSD) = q_BHLD[part.rows, :, : part.length], held[:, part.rows, :, keys]
                found = _attend_block(q_bHAD, k_bKSD, v_bKSD, is_own=owner == group.rank, scale=scale)
                merged[i] = _merge(merged[i], found)
        if owner == group.rank:  # while the neighbour's keys and values are being received
            out_BLHD = attend_heads(q_BHLD, k_BKLD, v_BKLD, cuts.local, first=0, repeats=repeats, scale=scale)
        pending.wait()
        held = coming
    for part, result in zip(cuts.continued, merged, strict=True):
        assert result is not None
        out_BLHD[part.rows, : part.length] = result.out.transpose(1, 2).to(out_BLHD.dtype)
    return out_BLHD


def _pass_on(held: Tensor, owner: int, group: SequenceGroup) -> tuple[Pending, Tensor]:
    """Start to send `owner`'s keys and values to the next rank, and to receive those of the rank before `owner`."""
    sent = {group.rank + 1: held} if group.rank + 1 < group.size else {}
    coming = torch.empty_like(held)
    group.traffic.forward_bytes += sum(x.nbytes for x in sent.values())
    return post(group, sent, {group.rank - 1: coming} if owner else {}), coming


class _Partial(NamedTuple):
    """Attention over some of the keys: (B, H, A, D) in fp32 or fp64, and log Σ exp(score) over these keys (B, H, A)."""

    out: Tensor
    lse: Tensor


def _merge(one: _Partial | None, other: _Partial) -> _Partial:
    if one is None:
        return other
    lse = torch.logaddexp(one.lse, other.lse)
    weights = ((x.lse - lse).exp_()[..., None] for x in (one, other))
    return _Partial(one.out * next(weights) + other.out * next(weights), lse)


def _attend_block(q_BHAD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, *, is_own: bool, scale: float | None) -> _Partial:
    """Causal attention to this rank's own keys; full attention to those of others, for which the R query heads of a
    key-value head are folded into one longer query.
    """
    num_rows, num_heads, num_queries, width = q_BHAD.shape
    num_kv_heads = k_BKSD.shape[1]
    q = q_BHAD.reshape(num_rows * num_kv_heads, -1, num_queries, width)
    k, v = (x.reshape(num_rows * num_kv_heads, 1, -1, width) for x in (k_BKSD, v_BKSD))
    if is_own:
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    else:
        q = q.reshape(num_rows * num_kv_heads, 1, -1, width)
    out, lse = _flash(q, k, v, is_causal=is_own, scale=scale)
    shape = num_rows, num_heads, num_queries
    return _Partial(out.reshape(*shape, width).to(lse.dtype), lse.reshape(shape))


def _flash(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """scaled_dot_product_attention with its log-sum-exp, which the public function does not return."""
    ops = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    elif q.dtype in (torch.float16, torch.bfloat16):
        out, lse, *_ = ops._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)
    else:
        out, lse, *_ = ops._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)
        lse = lse[..., : q.shape[2]]  # padded to the kernel's tiles
    return out, lse


def ring_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    config: Any,
    device: torch.device | str = "cpu",
    **_: Any,
) -> RingCuts:
    """The cuts of a batch, in place of its mask. Raises UnsupportedError outside of `sequence_parallel`."""
    active = active_shard()
    if active is None or q_length != kv_length:
        raise UnsupportedError("attention over a sequence group needs whole rows inside sequence_parallel, no cache")
    sharded = active.take(batch_size, q_length, attention_mask, config)
    return ring_cuts(sharded.document_ids_BN, sharded.group, device=device)


def ring_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: RingCuts | Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query (B, H, L, D), key and value (B, K, L, D) → (B, L, H, D). `attention_mask` is the result of `ring_mask`."""
    if not isinstance(attention_mask, RingCuts):
        raise UnsupportedError("attention over a sequence group takes no ready-made mask")
    if query.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError("dense attention over a sequence group is for evaluation; run it under torch.no_grad()")
    if sliding_window is not None and sliding_window < attention_mask.row_length:
        raise UnsupportedError(f"dense evaluation does not combine with a sliding window of {sliding_window} tokens")
    if getattr(module, "layer_idx", 0) == 0 and (active := active_shard()) is not None:
        active.check_positions(position_ids)
    return ring_attention(query, key, value, attention_mask, scale=scaling), None


AttentionInterface.register(RING, ring_forward)
AttentionMaskInterface.register(RING, ring_mask)
