"""Dense causal attention inside transformers' models while they train, as `loray.train.hooks.s2` is for S2-Attn.

`attn_implementation="loray_dense"` selects it. Rows are cut into their documents without padding, once a batch, and
each document is a segment of causal attention: no mask of T × T positions exists. Inside `sequence_parallel` the ranks
of a group share the rows by Ulysses or a ring, as `loray.planning.exchange.dense` chooses. A cache, sliding windows and
dropout on attention weights are left to transformers' own attention.
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
from loray.planning.exchange.dense import DensePlan
from loray.train.attention.cuts import Segments, document_segments
from loray.train.attention.shifted import attend_heads
from loray.train.hooks.s2 import find_documents
from loray.train.sequence.ring import RingCuts, ring_attention, ring_cuts
from loray.train.sequence.shard import ActiveShard, active_shard
from loray.train.sequence.ulysses import UlyssesCuts, ulysses_attention, ulysses_cuts

DENSE = "loray_dense"

DenseCuts = Segments | UlyssesCuts | RingCuts


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
) -> DenseCuts | Tensor | None:
    """The documents of a batch, in place of its mask; transformers' mask where `dense_forward` computes as it does."""
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
) -> UlyssesCuts | RingCuts:
    sharded = active.take(num_rows, num_tokens, attention_mask, config)
    if config.attention_dropout:
        raise UnsupportedError(
            "attention over a sequence group has no dropout on its weights; set attention_dropout to 0"
        )
    heads = config.num_attention_heads, config.num_key_value_heads
    plan = DensePlan(sharded.row_length, sharded.group.size, *heads)
    cuts_of = ulysses_cuts if plan.exchange == "ulysses" else ring_cuts
    return cuts_of(sharded.document_ids_BN, sharded.group, device=device)


def dense_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: DenseCuts | Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, H, T, D), key and value (B, K, T, D) → (B, T, H, D). `attention_mask` is the result of `dense_mask`."""
    if isinstance(attention_mask, Segments):
        repeats = query.shape[1] // key.shape[1]
        return attend_heads(query, key, value, attention_mask, first=0, repeats=repeats, scale=scaling), None
    if not isinstance(attention_mask, UlyssesCuts | RingCuts):
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
    if isinstance(attention_mask, UlyssesCuts):
        return ulysses_attention(query, key, value, attention_mask, scale=scaling), None
    return ring_attention(query, key, value, attention_mask, scale=scaling), None


AttentionInterface.register(DENSE, dense_forward)
AttentionMaskInterface.register(DENSE, dense_mask)
