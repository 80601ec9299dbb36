"""One rank of one attention layer over a sequence group; prints the bytes that it sends in the forward pass as JSON.

    python -m benchmarks.training.workers.traffic RENDEZVOUS RANK NUM_RANKS NUM_TOKENS GROUP_SIZE

The row is bf16 with 8 query heads and 4 key-value heads of width 64. Ulysses needs numbers of heads that 2 and 4 ranks
divide.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from loray.train.sequence import SentBytes, SequenceGroup
from loray.train.sequence.dense import segment_gathered, ulysses_attention
from loray.train.sequence.halo import attend_shard, segment_shard
from loray.train.sequence.ring import ring_attention, segment_ring

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 4, 64


def main(group: SequenceGroup, num_tokens: int, group_size: int) -> dict[str, int]:
    length = num_tokens // group.size
    q, k, v = (
        torch.randn(1, heads, length, HEAD_DIM, dtype=torch.bfloat16)
        for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    )
    ids_BN = torch.zeros(1, num_tokens, dtype=torch.long)

    def sent(attend: Callable[[SequenceGroup], Tensor]) -> int:
        counted = replace(group, traffic=SentBytes())
        attend(counted)
        return counted.traffic.forward_bytes

    return {
        "halo": sent(lambda counted: attend_shard(q, k, v, segment_shard(ids_BN, counted, group_size), layer=0)),
        "ulysses": sent(lambda counted: ulysses_attention(q, k, v, segment_gathered(ids_BN, counted))),
        "ring": sent(lambda counted: ring_attention(q, k, v, segment_ring(ids_BN, counted))),
    }


if __name__ == "__main__":
    rendezvous, *numbers = sys.argv[1:]
    rank, num_ranks, num_tokens, group_size = map(int, numbers)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_ranks)
    assert dist.group.WORLD is not None
    measured = main(SequenceGroup.of(dist.group.WORLD), num_tokens, group_size)
    sys.stdout.write(json.dumps(measured) + "\n")
    dist.destroy_process_group()
