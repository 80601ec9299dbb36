"""Strategies: how parameters, gradients and optimizer states are distributed over the ranks.

    ddp     everything on every rank; gradients are all-reduced in buckets during the backward pass
    zero2   DeepSpeed: gradients and optimizer states are sharded
    zero3   DeepSpeed: parameters are sharded as well, those of the frozen base included
    fsdp2   torch's fully_shard: shards the same as zero3

All work over the whole world, sequence × data: a rank's loss is its share of the step's loss, and gradients are summed.
"""

from loray.train.strategies.choice import prepare
from loray.train.strategies.ddp import Strategy

__all__ = ["Strategy", "prepare"]
