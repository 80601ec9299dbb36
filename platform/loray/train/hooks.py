"""S2-Attn and dense attention inside transformers' models, through their attention and mask interfaces.

Model classes do not change; `attn_implementation` is `ATTENTION` or `DENSE`. A mask function returns the batch's
segments, which every layer gets in place of a mask of T × T positions. Inside `sequence_parallel` they are those of the
sharded batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from loray.errors import UnsupportedError
from loray.planning.sequence import DensePlan
from loray.train.attention.attend import attend, attend_heads
from loray.train.attention.segments import AttentionSegments, BatchSegments, document_segments, segment_batch
from loray.train.sequence.dense import GatheredSegments, segment_gathered, ulysses_attention
from loray.train.sequence.halo import ShardSegments, attend_shard, segment_shard
from loray.train.sequence.ring import RingSegments, ring_attention, segment_ring
from loray.train.sequence.shard import ActiveShard, active_shard

# -- S2-Attn ----------------------------------------------------------------------------------------------------------
#
# `config.s2_group_size` is G. The mask function finds padding (2D attention mask, right-padded) and packing (position
# ids that restart).

ATTENTION = "s2_attn"


def s2_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    attention_mask: Tensor | None = None,
    config: Any,
    device: torch.device | str = "cpu",
    **_: Any,
) -> BatchSegments | ShardSegments:
    """Find the segments of a batch, in place of its mask. Raises UnsupportedError for a cache or left padding."""
    if q_length != kv_length or q_offset:
        raise UnsupportedError("S2-Attn is for training on whole rows, without a cache; generate inside dense(model)")
    if (active := active_shard()) is not None:
        sharded = active.take(batch_size, q_length, attention_mask, config)
        group_size, keep = config.s2_group_size, active.keep_halos
        return segment_shard(sharded.document_ids_BN, sharded.group, group_size, keep_halos=keep, device=device)
    _check_padding(attention_mask)
    return segment_batch(
        batch_size,
        q_length,
        config.s2_group_size,
        document_ids_BT=find_documents(batch_size, q_length, mask_function, attention_mask, device),
        device=device,
    )


def find_documents(
    num_rows: int,
    num_tokens: int,
    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    attention_mask: Tensor | None,
    device: torch.device | str,
) -> Tensor:
    """Find document ids (B, T), −1 on padding. Packing is known only from `mask_function`: a document starts where t
    does not attend to t − 1.
    """
    rows_B1 = torch.arange(num_rows, device=device)[:, None]
    later_1T = torch.arange(1, num_tokens, device=device)[None]
    joined = mask_function(rows_B1, torch.zeros_like(rows_B1), later_1T, later_1T - 1)
    ids_BT = torch.zeros(num_rows, num_tokens, dtype=torch.long, device=device)
    ids_BT[:, 1:] = (~joined).expand(num_rows, num_tokens - 1).cumsum(1)
    return ids_BT if attention_mask is None else ids_BT.masked_fill(~attention_mask.bool(), -1)


def _check_padding(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        real_BT = attention_mask.bool()
        if bool((real_BT[:, 1:] & ~real_BT[:, :-1]).any()):
            raise UnsupportedError(
                "S2-Attn takes rows padded on the right: its groups are counted from the first column"
            )


def s2_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BatchSegments | ShardSegments | Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute (B, T, H, D) of query (B, H, T, D), key and value (B, K, T, D). `s2_mask` made the mask."""
    if not isinstance(attention_mask, BatchSegments | ShardSegments):
        raise UnsupportedError("S2-Attn takes a 2D attention mask or none; ready-made 4D masks are not supported")
    if dropout:
        raise UnsupportedError("S2-Attn has no dropout on attention weights; set attention_dropout to 0")
    if kwargs.get("use_cache"):
        raise UnsupportedError("S2-Attn is for training, without a cache; pass use_cache=False")
    window = kwargs.get("sliding_window")
    row_length = attention_mask.row_length if isinstance(attention_mask, ShardSegments) else query.shape[2]
    if window is not None and window < row_length:
        raise UnsupportedError(f"S2-Attn does not combine with a sliding window of {window} tokens")
    is_first = getattr(module, "layer_idx", 0) == 0
    if isinstance(attention_mask, ShardSegments):
        if is_first and (active := active_shard()) is not None:  # None in the recomputation of the backward pass
            active.check_positions(kwargs.get("position_ids"))
        layer: Any = module.layer_idx
        return attend_shard(query, key, value, attention_mask, layer=layer, scale=scaling), None
    if is_first:
        _check_positions(attention_mask, kwargs.get("position_ids"))
    return attend(query, key, value, attention_mask, scale=scaling), None


def _check_positions(segments: BatchSegments, position_ids_BT: Tensor | None) -> None:
    """Raise ValueError for packed rows with a mask: transformers looks for packing only where there is no mask."""
    if position_ids_BT is None:
        return
    inside_BT = torch.diff(position_ids_BT, dim=1) == 1
    ids_BT = segments.document_ids_BT
    if ids_BT is not None:
        inside_BT = inside_BT | (ids_BT[:, 1:] != ids_BT[:, :-1]) | (ids_BT[:, 1:] < 0)
    if not bool(inside_BT.all()):
        raise ValueError("position_ids restart inside a row that has an attention mask; packed rows must not pass one")


AttentionInterface.register(ATTENTION, s2_attention_forward)
AttentionMaskInterface.register(ATTENTION, s2_mask)


# -- dense attention --------------------------------------------------------------------------------------------------
#
# Rows are cut into their documents without padding, once a batch. The ranks of a sequence group share them by Ulysses
# or a ring, as `loray.planning.sequence` chooses. A cache, sliding windows and dropout on attention weights are left to
# transformers' own attention.

DENSE = "loray_dense"
DenseSegments = AttentionSegments | GatheredSegments | RingSegments


def dense_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    config: Any,
    device: torch.device | str = "cpu",
    **others: Any,
) -> DenseSegments | Tensor | None:
    """Find the documents of a batch, in place of its mask. Where `dense_forward` is transformers', so is the mask."""
    if (active := active_shard()) is not None:
        if q_length != kv_length or q_offset:
            raise UnsupportedError("attention over a sequence group takes whole rows, without a cache")
        return _shared(active, batch_size, q_length, attention_mask, config, device)
    is_whole = q_length == kv_length and not q_offset and not others.get("use_vmap")
    if not is_whole or config.attention_dropout or (local_size is not None and local_size < kv_length):
        mask: Tensor | None = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            device=device,
            **others,
        )
        return mask
    ids_BT = find_documents(batch_size, q_length, mask_function, attention_mask, device)
    return document_segments(ids_BT, device=device)


def _shared(
    active: ActiveShard,
    num_rows: int,
    num_tokens: int,
    attention_mask: Tensor | None,
    config: Any,
    device: torch.device | str,
) -> GatheredSegments | RingSegments:
    sharded = active.take(num_rows, num_tokens, attention_mask, config)
    if config.attention_dropout:
        raise UnsupportedError(
            "attention over a sequence group has no dropout on its weights; set attention_dropout to 0"
        )
    heads = config.num_attention_heads, config.num_key_value_heads
    plan = DensePlan(sharded.row_length, sharded.group.size, *heads)
    segment = segment_gathered if plan.exchange == "ulysses" else segment_ring
    return segment(sharded.document_ids_BN, sharded.group, device=device)


def dense_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: DenseSegments | Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute (B, T, H, D) of query (B, H, T, D), key and value (B, K, T, D). `dense_mask` made the mask."""
    if isinstance(attention_mask, AttentionSegments):
        repeats = query.shape[1] // key.shape[1]
        return attend_heads(query, key, value, attention_mask, first=0, repeats=repeats, scale=scaling), None
    if not isinstance(attention_mask, GatheredSegments | RingSegments):
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    window = kwargs.get("sliding_window")
    if window is not None and window < attention_mask.row_length:
        raise UnsupportedError(
            f"a sliding window of {window} tokens is shorter than the rows of {attention_mask.row_length}; "
            "attention over a sequence group has none"
        )
    if getattr(module, "layer_idx", 0) == 0 and (active := active_shard()) is not None:
        active.check_positions(kwargs.get("position_ids"))
    if isinstance(attention_mask, GatheredSegments):
        return ulysses_attention(query, key, value, attention_mask, scale=scaling), None
    return ring_attention(query, key, value, attention_mask, scale=scaling), None


AttentionInterface.register(DENSE, dense_forward)
AttentionMaskInterface.register(DENSE, dense_mask)
