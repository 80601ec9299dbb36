"""The part of a batch that the last layer computes.

Of a prompt only the last token's logits are needed, so in the last layer its other tokens need keys and values and
nothing else: no attention, no output projection and no MLP.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

import torch

from loray.engine.model.batch import AdapterBatch, Batch, Slot
from loray_kernels import AttentionMeta


def kept_part(batch: Batch) -> Batch | None:
    """The batch of the tokens whose logits are needed. None where it would save too little.

    One token is kept if none is needed, since ops take no empty batch; it has no logits.
    """
    num = batch.token_ids_T.shape[0]
    kept = batch.last or (num - 1,)
    if batch.scored_T is not None or 2 * len(kept) > num:
        return None
    device, attention = batch.token_ids_T.device, batch.attention
    kept_T = torch.tensor(kept, dtype=torch.int64, device=device)
    ends = {stop - 1: i for i, (start, stop) in enumerate(pairwise(attention.query_start)) if stop > start}
    sequences = [ends[token] for token in kept]
    slots = [Slot(a, bisect_left(kept, start), bisect_left(kept, stop)) for a, start, stop in batch.adapters.slots]
    return Batch(
        token_ids_T=batch.token_ids_T[kept_T],
        positions_T=batch.positions_T[kept_T],
        attention=AttentionMeta(
            tuple(range(len(kept) + 1)),
            tuple(attention.context_len[i] for i in sequences),
            tuple(attention.block_table[i] for i in sequences),
            attention.slots_T[kept_T],
        ),
        adapters=AdapterBatch([slot for slot in slots if slot.stop > slot.start], device=device),
        own_rows=None,
        logits_T=torch.arange(len(batch.last), device=device),
        last=tuple(range(len(batch.last))),
        sampled=batch.sampled,
        kept_T=kept_T,
    )
