"""S2-Attn and dense attention inside transformers' models, through their attention and mask interfaces.

Model classes do not change; `attn_implementation` is `ATTENTION`, whose G is `config.s2_group_size`, or `DENSE`. The
mask function finds padding (a 2D attention mask) and packing (position ids that restart), once a batch, and returns
segments, which every layer gets in place of a mask of T × T positions. Inside `sequence_parallel` they are those of the
sharded batch, inside `along_paths` those of trees. A layer with a sliding window that is shorter than the rows keeps
it, also beside layers with S2-Attn; windows are left to transformers, and so are, in dense attention, a cache and
dropout on attention weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from loray.errors import UnsupportedError
from loray.train.attention.attend import attend, attend_heads
from loray.train.attention.prefixes import PathSegments, active_paths, attend_paths
from loray.train.attention.segments import AttentionSegments, BatchSegments, document_segments, segment_batch
from loray.train.sequence.dense import GatheredSegments, segment_gathered, ulysses_attention
from loray.train.sequence.halo import ShardSegments, attend_shard, segment_shard
from loray.train.sequence.shard import active_shard

ATTENTION, DENSE = "s2_attn", "loray_dense"

Segments = BatchSegments | ShardSegments | AttentionSegments | GatheredSegments | PathSegments


def segments_mask(
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
) -> Segments | Tensor | None:
    """Find the segments of a batch, in place of its mask; transformers' own mask where attention is transformers', too.

    Raises UnsupportedError for a cache or left padding with S2-Attn, for a cache or dropout over a sequence group, and
    for whatever is not plain dense attention along paths.
    """
    is_s2 = config._attn_implementation == ATTENTION
    is_whole = q_length == kv_length and not q_offset
    if is_s2 and not is_whole:
        raise UnsupportedError("S2-Attn is for training on whole rows, without a cache; generate inside dense(model)")
    if (active := active_shard()) is not None:
        if not is_whole:
            raise UnsupportedError("attention over a sequence group takes whole rows, without a cache")
        sharded = active.take(batch_size, q_length, attention_mask, config)
        ids_BN, group = sharded.document_ids_BN, sharded.group
        if is_s2:
            return segment_shard(ids_BN, group, config.s2_group_size, keep_halos=active.keep_halos)
        if config.attention_dropout:
            raise UnsupportedError(
                "attention over a sequence group has no dropout on its weights; set attention_dropout to 0"
            )
        return segment_gathered(ids_BN, group)
    has_window = local_size is not None and local_size < kv_length
    has_cap = getattr(config, "attn_logit_softcapping", None) is not None
    if (paths := active_paths()) is not None:
        if not takes_paths(config) or not is_whole:
            raise UnsupportedError(
                "along paths there is plain dense attention alone, to whole rows; compute rows apart"
            )
        return paths
    if has_window or has_cap or (not is_s2 and (not is_whole or config.attention_dropout or others.get("use_vmap"))):
        if has_cap:
            others["allow_is_causal_skip"] = False
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
    if not is_s2:
        return document_segments(ids_BT)
    if attention_mask is not None and bool(((ids_BT[:, 1:] >= 0) & (ids_BT[:, :-1] < 0)).any()):
        raise UnsupportedError("S2-Attn takes rows padded on the right: its groups are counted from the first column")
    return segment_batch(batch_size, q_length, config.s2_group_size, document_ids_BT=ids_BT)


def takes_paths(config: Any) -> bool:
    """Return whether the model of this configuration has plain dense attention in each layer."""
    has_other = (getattr(config, name, None) for name in ("sliding_window", "attn_logit_softcapping"))
    return config._attn_implementation == DENSE and not config.attention_dropout and not any(has_other)


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


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Segments | Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute (B, T, H, D) of query (B, H, T, D), key and value (B, K, T, D). `segments_mask` made the mask."""
    if attention_mask is None or isinstance(attention_mask, Tensor):
        config: Any = module.config
        if config._attn_implementation == ATTENTION and kwargs.get("sliding_window") is None:
            raise UnsupportedError("S2-Attn takes a 2D attention mask or none; ready-made 4D masks are not supported")
        if (cap := kwargs.pop("softcap", None)) is not None:
            assert attention_mask is not None
            return _capped(query, key, value, attention_mask, scaling, cap, dropout), None
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    is_s2 = isinstance(attention_mask, BatchSegments | ShardSegments)
    is_shared = isinstance(attention_mask, ShardSegments | GatheredSegments)
    if is_s2 and dropout:
        raise UnsupportedError("S2-Attn has no dropout on attention weights; set attention_dropout to 0")
    if is_s2 and kwargs.get("use_cache"):
        raise UnsupportedError("S2-Attn is for training, without a cache; pass use_cache=False")
    window, row_length = kwargs.get("sliding_window"), query.shape[2]
    if isinstance(attention_mask, ShardSegments | GatheredSegments):
        row_length = attention_mask.row_length
    if is_shared and window is not None and window < row_length:
        raise UnsupportedError(
            f"a sliding window of {window} tokens is shorter than the rows of {row_length}, and attention over a "
            "sequence group has none: set parallel.sequence to 1, or data.max_length to the window's length"
        )
    if getattr(module, "layer_idx", 0) == 0:
        if is_shared and (active := active_shard()) is not None:  # None in the recomputation of the backward pass
            active.check_positions(kwargs.get("position_ids"))
        elif isinstance(attention_mask, BatchSegments):
            _check_positions(attention_mask, kwargs.get("position_ids"))
    match attention_mask:
        case BatchSegments():
            return attend(query, key, value, attention_mask, scale=scaling), None
        case ShardSegments():
            layer: Any = module.layer_idx
            return attend_shard(query, key, value, attention_mask, layer=layer, scale=scaling), None
        case GatheredSegments():
            return ulysses_attention(query, key, value, attention_mask, scale=scaling), None
        case PathSegments():
            return attend_paths(query, key, value, attention_mask, scale=scaling), None
        case AttentionSegments():
            repeats = query.shape[1] // key.shape[1]
            return attend_heads(query, key, value, attention_mask, first=0, repeats=repeats, scale=scaling), None


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, cap: float, dropout: float
) -> Tensor:
    """Compute (B, T, H, D) with scores s, scaled, of cap · tanh(s / cap): op by op, since no kernel has them."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.tanh(query @ key.mT * (scale / cap)) * cap
    exact = torch.promote_types(query.dtype, torch.float32)
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1, dtype=exact).to(query.dtype)
    return (F.dropout(weights, dropout, training=dropout > 0) @ value).transpose(1, 2)


for _name in (ATTENTION, DENSE):
    AttentionInterface.register(_name, attention_forward)
    AttentionMaskInterface.register(_name, segments_mask)
