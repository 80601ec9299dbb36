"""S2-Attn inside transformers' models, through its attention and mask interfaces. Model classes do not change.

`attn_implementation="s2_attn"` selects it; `config.s2_group_size` is G. The mask function finds padding (2D attention
mask, right-padded) and packing (position ids that restart), and returns the batch's `Cuts`, which each layer gets in
place of a mask. Inside `sequence_parallel` both are known from the sharded batch, and it returns `ShardCuts`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from loray.errors import UnsupportedError
from loray.train.attention.cuts import Cuts, compute_cuts
from loray.train.attention.shifted import attend
from loray.train.sequence.attention import attend_shard
from loray.train.sequence.cuts import ShardCuts, shard_cuts
from loray.train.sequence.shard import active_shard

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
) -> Cuts | ShardCuts:
    """The cuts of a batch, in place of its mask. Raises UnsupportedError for a cache or left padding."""
    if q_length != kv_length or q_offset:
        raise UnsupportedError("S2-Attn is for training on whole rows, without a cache; generate inside dense(model)")
    if (active := active_shard()) is not None:
        sharded = active.take(batch_size, q_length, attention_mask, config)
        group_size, keep = config.s2_group_size, active.keep_halos
        return shard_cuts(sharded.document_ids_BN, sharded.group, group_size, keep_halos=keep, device=device)
    _check_padding(attention_mask)
    return compute_cuts(
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
    """Document ids (B, T), −1 on padding. Packing is known only from `mask_function`: a document starts where t does
    not attend to t − 1.
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
    attention_mask: Cuts | ShardCuts | Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, H, T, D), key and value (B, K, T, D) → (B, T, H, D). `attention_mask` is the result of `s2_mask`."""
    if not isinstance(attention_mask, Cuts | ShardCuts):
        raise UnsupportedError("S2-Attn takes a 2D attention mask or none; ready-made 4D masks are not supported")
    if dropout:
        raise UnsupportedError("S2-Attn has no dropout on attention weights; set attention_dropout to 0")
    if kwargs.get("use_cache"):
        raise UnsupportedError("S2-Attn is for training, without a cache; pass use_cache=False")
    window = kwargs.get("sliding_window")
    row_length = attention_mask.row_length if isinstance(attention_mask, ShardCuts) else query.shape[2]
    if window is not None and window < row_length:
        raise UnsupportedError(f"S2-Attn does not combine with a sliding window of {window} tokens")
    is_first = getattr(module, "layer_idx", 0) == 0
    if isinstance(attention_mask, ShardCuts):
        if is_first and (active := active_shard()) is not None:  # None in the recomputation of the backward pass
            active.check_positions(kwargs.get("position_ids"))
        layer: Any = module.layer_idx
        return attend_shard(query, key, value, attention_mask, layer=layer, scale=scaling), None
    if is_first:
        _check_positions(attention_mask, kwargs.get("position_ids"))
    return attend(query, key, value, attention_mask, scale=scaling), None


def _check_positions(cuts: Cuts, position_ids_BT: Tensor | None) -> None:
    """Raise ValueError for packed rows with a mask: transformers looks for packing only where there is no mask."""
    if position_ids_BT is None:
        return
    inside_BT = torch.diff(position_ids_BT, dim=1) == 1
    ids_BT = cuts.document_ids_BT
    if ids_BT is not None:
        inside_BT = inside_BT | (ids_BT[:, 1:] != ids_BT[:, :-1]) | (ids_BT[:, 1:] < 0)
    if not bool(inside_BT.all()):
        raise ValueError("position_ids restart inside a row that has an attention mask; packed rows must not pass one")


AttentionInterface.register(ATTENTION, s2_attention_forward)
AttentionMaskInterface.register(ATTENTION, s2_mask)
