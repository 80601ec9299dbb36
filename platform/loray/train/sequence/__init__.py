"""Sequence parallelism: each rank of a group holds a contiguous part of the same rows.

    group = SequenceGroup.of(process_group)           # once; all ranks of the process group call it
    sharded = shard(batch, group)                     # with the same whole batch on every rank of the group
    with sequence_parallel(sharded):
        loss = batch_loss(model, sharded.local)       # or model(**sharded.local.model_inputs(device))
    (loss / num_targets).backward()                   # labels of the whole step

With S2-Attn a rank receives the keys and values of its halo from earlier ranks. With dense attention the ranks exchange
tokens for heads. Models attend by `loray.train.hooks`, in evaluation inside `dense(model, group)`;
`loray.planning.sequence` plans the exchange.

- `sharded.local` is a `TrainBatch` of L positions per row. Labels are shifted over the whole row before it is cut,
  positions count over the whole row, and `num_targets` and `num_tokens` count those of this rank. Their sums over all
  ranks, sequence and data parallel, are exact.
- A rank may hold no target, or padding alone. It must run forward and backward, too, since its neighbours wait for it.
  Every rank of a group makes the same calls in the same order.
- The gradients of a rank include those of its keys and values on later ranks. Sum them over the ranks of the group, as
  over data-parallel ranks.
- The context is needed around the forward pass only. Recomputation in the backward pass (activation checkpointing,
  `use_reentrant=False`) works outside of it, with halos from memory, or with `keep_halos=False` by another exchange.
  Dense attention exchanges a second time.
- `group.traffic` counts the bytes that this rank sent.
"""

from loray.train.sequence.shard import (
    SentBytes,
    SequenceGroup,
    ShardedBatch,
    group_size,
    sequence_parallel,
    shard,
    sum_over_group,
)

__all__ = [
    "SentBytes",
    "SequenceGroup",
    "ShardedBatch",
    "group_size",
    "sequence_parallel",
    "shard",
    "sum_over_group",
]
