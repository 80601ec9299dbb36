"""Cached prefixes and idle adapters compete for blocks by one value. Mixed traffic is simulated with that rule and with
the two that prefer one class: what is spent on fetching and computing again is counted in seconds.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest

from loray.engine.memory.blocks import Extent
from loray.engine.memory.kv_cache import KVCacheManager
from loray.engine.request import Request
from loray.spec import AdapterRef, GenerateRequest, SamplingParams
from tests.engine.scheduling.simulation import BLOCK_TOKENS, Packed, Simulation, adapter

NUM_BLOCKS, ADAPTER_BLOCKS = 240, 4


class Call(NamedTuple):
    prompt: tuple[int, ...]
    adapter: AdapterRef | None


class Timed(Simulation):
    """Placing an adapter takes `block_s` for each of its blocks."""

    block_s = 0.0
    num_placed = 0

    def _place(self, ref: AdapterRef, packed: Packed) -> list[Extent] | None:
        extents = super()._place(ref, packed)
        if extents is not None:
            self.now += self.block_s * ref.nbytes
            self.num_placed += 1
        return extents


class Outcome(NamedTuple):
    seconds: float  # of placing adapters and computing prompts
    prefix_hits: float  # of the prompts' tokens
    adapter_hits: float  # of the requests with an adapter


def replay(calls: list[Call], *, block_s: float, token_s: float) -> Outcome:
    sim = Timed(num_blocks=NUM_BLOCKS, token_s=token_s)
    sim.block_s = block_s
    computed = 0
    for i, call in enumerate(calls):
        request = Request(GenerateRequest(str(i), call.prompt, SamplingParams(max_tokens=1), call.adapter), i)
        sim.scheduler.add(request)
        sim.ends[request] = 1
        if i % 3 == 2:
            sim.run()
    sim.run()
    assert all(error is None for error in sim.outcomes.values())
    num_tokens = sum(len(call.prompt) for call in calls)
    num_calls = sum(call.adapter is not None for call in calls)
    computed = num_tokens - sim.scheduler.kv_cache.num_hits
    return Outcome(
        token_s * computed + block_s * ADAPTER_BLOCKS * sim.num_placed,
        sim.scheduler.kv_cache.num_hits / num_tokens,
        1 - sim.num_placed / max(1, num_calls),
    )


def mixed(num_calls: int, *, prefix_tokens: int, seed: int = 0) -> list[Call]:
    """Half of the calls begin with one of four long system prompts, of the base; the others are for 300 adapters by a
    power law, with prompts of their own.
    """
    rng = random.Random(seed)
    prefixes = [tuple(range(1000 * p, 1000 * p + prefix_tokens)) for p in range(4)]
    adapters = [adapter(str(i), ADAPTER_BLOCKS) for i in range(300)]
    weights = [1 / (i + 1) for i in range(300)]
    calls = []
    for i in range(num_calls):
        own = tuple(range(10_000 + 40 * i, 10_000 + 40 * i + 2 * BLOCK_TOKENS))
        if rng.random() < 0.5:
            calls.append(Call((*rng.choice(prefixes), *own), None))
        else:
            calls.append(Call(own, rng.choices(adapters, weights)[0]))
    return calls


def prefixes_first(self: KVCacheManager, num_blocks: int) -> bool:
    return bool(self.prefix_cache.evict(num_blocks)) or self._adapter_manager.evict_one()


def adapters_first(self: KVCacheManager, num_blocks: int) -> bool:
    return self._adapter_manager.evict_one() or bool(self.prefix_cache.evict(num_blocks))


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Outcome, Outcome, Outcome]]:
    """By value, prefixes first, adapters first."""

    def run(calls: list[Call], **costs: float) -> tuple[Outcome, Outcome, Outcome]:
        by_value = replay(calls, **costs)
        others = []
        for policy in (prefixes_first, adapters_first):
            monkeypatch.setattr(KVCacheManager, "make_room", policy)
            others.append(replay(calls, **costs))
            monkeypatch.undo()
        return by_value, others[0], others[1]

    return run


def test_hot_prefixes_stay_beside_many_adapters(compare: Callable[..., tuple[Outcome, Outcome, Outcome]]) -> None:
    by_value, prefixes_go, adapters_go = compare(mixed(1200, prefix_tokens=80), block_s=0.004, token_s=0.001)
    assert by_value.prefix_hits > 1.5 * prefixes_go.prefix_hits
    assert by_value.adapter_hits > 1.1 * adapters_go.adapter_hits
    assert by_value.seconds < 0.9 * min(prefixes_go.seconds, adapters_go.seconds)


@pytest.mark.parametrize(("block_s", "token_s"), [(0.0001, 0.001), (0.1, 0.001)])
def test_neither_class_starves_where_the_other_is_costly(
    compare: Callable[..., tuple[Outcome, Outcome, Outcome]], block_s: float, token_s: float
) -> None:
    by_value, prefixes_go, adapters_go = compare(mixed(1200, prefix_tokens=80), block_s=block_s, token_s=token_s)
    assert by_value.seconds < 1.05 * min(prefixes_go.seconds, adapters_go.seconds)
    assert by_value.prefix_hits > 0.1
    assert by_value.adapter_hits > 0.1


def test_what_was_hot_goes_when_the_traffic_changes() -> None:
    """The floor rises: prefixes that nobody asks for any more make way for adapters, however costly they were."""
    hot, later = mixed(600, prefix_tokens=80), [c for c in mixed(3000, prefix_tokens=80, seed=1) if c.adapter]
    costs = {"block_s": 0.004, "token_s": 0.001}
    alone, after = replay(later, **costs), replay(hot + later, **costs)
    placed_before = replay(hot, **costs)
    num_hot = sum(c.adapter is not None for c in hot)
    misses = (1 - after.adapter_hits) * (num_hot + len(later)) - (1 - placed_before.adapter_hits) * num_hot
    assert misses < 1.3 * (1 - alone.adapter_hits) * len(later)
