"""Bytes that a rank of a sequence group sends in the forward pass of a layer, counted at the collective: those of the
halo plan, and those of the formula of Ulysses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loray.planning.sequence import HaloPlan, ulysses_elements
from loray.train.sequence import SentBytes, SequenceGroup
from loray.train.sequence.dense import segment_gathered, ulysses_attention
from loray.train.sequence.halo import attend_shard, segment_shard
from tests.fixtures.ranks import Ranks

TOKENS, HEADS, KV_HEADS, WIDTH = 128, 8, 4, 64  # heads that 2 and 4 ranks divide


def count(group: SequenceGroup, group_size: int) -> dict[str, int]:
    length = TOKENS // group.size
    q, k, v = (torch.randn(1, heads, length, WIDTH, dtype=torch.bfloat16) for heads in (HEADS, KV_HEADS, KV_HEADS))
    ids_BN = torch.zeros(1, TOKENS, dtype=torch.long)

    def sent(attend: Callable[[SequenceGroup], Tensor]) -> int:
        counted = replace(group, traffic=SentBytes())
        attend(counted)
        return counted.traffic.forward_bytes

    return {
        "halo": sent(lambda counted: attend_shard(q, k, v, segment_shard(ids_BN, counted, group_size), layer=0)),
        "ulysses": sent(lambda counted: ulysses_attention(q, k, v, segment_gathered(ids_BN, counted))),
    }


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("group_size", [16, 32, 48])
def test_counted_traffic_is_what_the_formulas_say(ranks: Ranks, size: int, group_size: int) -> None:
    found = ranks(size, count, group_size)
    plan = HaloPlan(TOKENS, size, group_size, HEADS, KV_HEADS)
    assert {name: max(rank[name] for rank in found) for name in found[0]} == {
        "halo": max(plan.elements_sent(rank, WIDTH) for rank in range(size)) * 2,
        "ulysses": ulysses_elements(TOKENS, size, HEADS, KV_HEADS, WIDTH) * 2,
    }
