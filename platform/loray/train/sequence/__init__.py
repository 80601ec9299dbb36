"""Sequence parallelism: each rank of a group holds a contiguous part of the same rows.

    group = SequenceGroup.of(process_group)           # once; all ranks of the process group call it
    sharded = shard(batch, group)                     # every rank of the group is given the same whole batch
    with sequence_parallel(sharded):
        loss = batch_loss(model, sharded.local)       # or model(**sharded.local.model_inputs(device))
    (loss.total / num_targets).backward()

Training needs a model with S2-Attn (`loray.train.hook`): keys and values of a halo move from rank to rank, see
`loray.planning.halo`. Evaluation runs inside `dense(model, group)`: full causal attention, keys and values passed
along the ranks, without gradients.

- `sharded.local` is an ordinary `Batch` of L positions a row: labels were shifted over the whole row before it was cut,
  positions count over the whole row, `num_targets` and `num_tokens` count what this rank holds. Their sums over all
  ranks of the world, sequence and data parallel alike, are exact; `sharded.num_targets` is the whole batch's.
- A rank may hold no target, or nothing but padding. It runs forward and backward all the same: its neighbours wait for
  it. Every rank of a group makes the same calls in the same order.
- Gradients of a rank are those of its own losses and of what its keys and values did on later ranks: sum them over the
  ranks of the group, as over data-parallel ranks.
- The context is needed around the forward pass only; recomputation in the backward pass (activation checkpointing,
  `use_reentrant=False`) works without. It finds the halos in memory, or with `keep_halos=False` asks for them again.
- `group.traffic` counts the bytes that this rank sent.
"""

from loray.train.sequence.group import SequenceGroup, Traffic
from loray.train.sequence.shard import ShardedBatch, sequence_parallel, shard

__all__ = ["SequenceGroup", "ShardedBatch", "Traffic", "sequence_parallel", "shard"]
