"""How parameters, gradients and optimizer states lie on the ranks; the loop knows `Strategy` alone.

    ddp     everything on every rank; gradients all-reduced in buckets, while the backward pass goes on
    zero2   DeepSpeed: gradients and optimizer states sharded
    zero3   DeepSpeed: the parameters too, the frozen base's above all
    fsdp2   torch's fully_shard: what zero3 shards

All work over the whole world, sequence × data: a rank's loss is its share of the step's, and gradients are summed.
"""

from loray.train.strategies.base import Strategy
from loray.train.strategies.choice import prepare

__all__ = ["Strategy", "prepare"]
