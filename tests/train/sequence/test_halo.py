"""S2-Attn over real ranks against its definition on whole rows: a boolean mask, softmax in fp64."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from loray.planning.sequence import HaloPlan
from loray.train import s2_attention
from loray.train.sequence import SequenceGroup, halo
from loray.train.sequence.halo import attend_shard, segment_shard
from loray.train.sequence.shard import Pending
from tests.fixtures.attention import oracle, oracle_mask, runs
from tests.fixtures.ranks import Ranks
from tests.train.sequence.cases import HEADS, Case, Part, check, documents, qkv_of, weights_of

GROUP = 16
LENGTHS = {"2G": 32, "G": 16, "3G/2": 24, "G/2": 8, "G/4": 4, "5G/8": 10}


def compute(group: SequenceGroup, case: Case, change: int | None = None) -> Part:
    """Forward and backward. `change` is a token of whole rows whose q, k and v are others."""
    ids_BN = torch.tensor(case.ids_BN)
    first = group.rank * case.length
    q, k, v = (x.requires_grad_() for x in qkv_of(case, group))
    if change is not None and first <= change < first + case.length:
        with torch.no_grad():
            for x in (q, k, v):
                x[:, :, change - first] += 3
    out = attend_shard(q, k, v, segment_shard(ids_BN, group, GROUP), layer=0)
    weights_BLHD = weights_of(*ids_BN.shape, case.heads)[:, first : first + case.length]
    (out * weights_BLHD.to(case.dtype)).sum().backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (q, k, v)]
    return Part(out.detach(), gradients, group.traffic.forward_bytes, group.traffic.backward_bytes)


@lru_cache
def halves_mask(ids: tuple[tuple[int, ...], ...]) -> Tensor:
    return oracle_mask(len(ids), 2, len(ids[0]), GROUP, torch.tensor(ids))


def expected(case: Case) -> tuple[Tensor, list[Tensor]]:
    halves = halves_mask(tuple(map(tuple, case.ids_BN)))
    middle = case.heads // 2
    q, k, v = (x.requires_grad_() for x in qkv_of(case))
    out = oracle(q, k, v, halves[:, [0] * middle + [1] * (case.heads - middle)]).transpose(1, 2)
    (out * weights_of(*out.shape[:3])).sum().backward()
    return out.detach(), [x.grad for x in (q, k, v) if x.grad is not None]


@pytest.mark.parametrize("kind", ["full", "padded at the end", "packed and ragged"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("size", [1, 2, 4])
def test_output_gradients_and_bytes(ranks: Ranks, size: int, length: int, heads: int, kv_heads: int, kind: str) -> None:
    case = Case(length, heads, kv_heads, documents(kind, size * length))
    parts: list[Part] = ranks(size, compute, case)
    check(parts, *expected(case))
    plan, num_rows = HaloPlan(size * length, size, GROUP, heads, kv_heads), len(case.ids_BN)
    assert [p.forward_bytes for p in parts] == [8 * plan.elements_sent(r, 8, num_rows) for r in range(size)]
    assert [p.backward_bytes for p in parts] == [8 * plan.elements_received(r, 8, num_rows) for r in range(size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["full", "packed"])
def test_no_position_sees_a_later_one(ranks: Ranks, kind: str, dtype: torch.dtype) -> None:
    """Bit-equal, across boundaries too. Code that rolls the sequence fails this on the first and the last rank."""
    ids = [0] * 40 if kind == "full" else runs((0, 13), (1, 27))
    case = Case(10, 6, 2, [ids], dtype)

    def output(change: int | None) -> Tensor:
        return torch.cat([part.out for part in ranks(4, compute, case, change)], dim=1)

    before = output(None)
    for j in (8, 9, 10, 19, 24, 32, 39):
        after = output(j)
        assert torch.equal(after[:, :j], before[:, :j])
        assert not torch.equal(after[:, j], before[:, j])


def order_of_work(group: SequenceGroup) -> list[str]:
    """What happens in a forward and a backward pass, as this rank sees it."""
    log: list[str] = []
    attend, post, wait = halo.attend_heads, halo.post, Pending.wait

    def attend_heads(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = "halo segments" if "wait" in log else "local segments"
        log.append(name)
        q.register_hook(lambda gradient: log.append(f"{name}, backward"))
        return attend(q, *args, **kwargs)

    def logged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (log.append(name), function(*args))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halo, "attend_heads", attend_heads)
        patch.setattr(halo, "post", logged("post", post))
        patch.setattr(Pending, "wait", logged("wait", wait))
        compute(group, Case(32, 4, 2, documents("full", 64)))
    return log


def test_messages_travel_while_what_needs_none_is_computed(ranks: Ranks) -> None:
    first, last = ranks(2, order_of_work)
    forward = ["post", "local segments", "local segments", "wait"]
    backward = ["post", "local segments, backward", "local segments, backward", "wait"]
    assert first == [*forward, *backward]
    assert last == [*forward, "halo segments", "halo segments, backward", *backward]


def only_values(group: SequenceGroup, case: Case) -> Tensor | None:
    q, k, v = qkv_of(case, group)
    v.requires_grad_()
    attend_shard(q, k, v, segment_shard(torch.tensor(case.ids_BN), group, GROUP), layer=0).square().sum().backward()
    return v.grad


def test_values_alone_may_be_trained(ranks: Ranks) -> None:
    """As in the first layer of a model with adapters on v_proj."""
    case = Case(16, 4, 2, documents("full", 32))
    q, k, v = qkv_of(case)
    s2_attention(q, k, v.requires_grad_(), group_size=GROUP).square().sum().backward()
    torch.testing.assert_close(torch.cat(ranks(2, only_values, case), dim=2), v.grad, atol=1e-12, rtol=1e-12)
