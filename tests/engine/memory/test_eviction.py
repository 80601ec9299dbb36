"""What is evicted: idle adapters by their value, against least recently used, and beside cached prefixes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loray.engine.memory.blocks import Extent
from loray.engine.memory.eviction import EvictionPolicy, EvictionScore, PriorityQueue
from loray.engine.memory.kv_cache import KVCacheManager
from loray.engine.request import Request
from loray.spec import AdapterRef, GenerateRequest, SamplingParams
from tests.fixtures.scheduling import BLOCK_TOKENS, Packed, Simulation, World, adapter


class Item(NamedTuple):
    size: int
    seconds: float


class Pool:
    """A cache of `capacity` blocks; counts the seconds that fetching takes."""

    def __init__(self, items: list[Item], capacity: int, *, greedy: bool) -> None:
        self.items, self.capacity, self.greedy = items, capacity, greedy
        self.eviction = EvictionPolicy()
        self.resident: dict[int, EvictionScore] = {}
        self.seconds = 0.0
        self.hits = 0

    def use(self, i: int) -> None:
        score = self.resident.pop(i, None)
        self.hits += score is not None
        if score is None:
            while sum(self.items[j].size for j in self.resident) + self.items[i].size > self.capacity:
                self.evict()
            score = EvictionScore()
            self.eviction.placed(score, self.items[i].seconds)
            self.seconds += self.items[i].seconds
        self.eviction.used(score)
        self.resident[i] = score  # the most recent stands last

    def evict(self) -> None:
        victim = min(self.resident, key=self.value) if self.greedy else next(iter(self.resident))
        self.eviction.inflation.evicted(self.value(victim))
        del self.resident[victim]

    def value(self, i: int) -> float:
        return self.eviction.value(self.resident[i], self.items[i].size, on_host=True)


def replay(items: list[Item], trace: list[int], capacity: int) -> tuple[Pool, Pool]:
    pools = Pool(items, capacity, greedy=False), Pool(items, capacity, greedy=True)
    for i in trace:
        for pool in pools:
            pool.use(i)
    return pools


def power_law(num_items: int, length: int, rng: random.Random, exponent: float = 1.0) -> list[int]:
    return rng.choices(range(num_items), [(i + 1) ** -exponent for i in range(num_items)], k=length)


def test_a_power_law_of_mixed_ranks_spends_less_time_fetching_than_least_recently_used() -> None:
    rng = random.Random(0)
    items = [Item(size, 0.001 * size) for size in rng.choices([3, 5, 10, 20, 40], k=300)]
    lru, greedy = replay(items, power_law(300, 20_000, rng), 600)
    assert greedy.hits > lru.hits
    assert greedy.seconds < 0.9 * lru.seconds


def test_what_is_not_used_any_more_goes_however_costly_it_was() -> None:
    items = [Item(1, 10.0), *[Item(1, 1.0)] * 4]
    pool = Pool(items, 3, greedy=True)
    pool.use(0)
    for i in range(200):
        pool.use(1 + i % 4)
    assert 0 not in pool.resident


def test_an_adapter_whose_host_copy_is_gone_is_worth_its_load() -> None:
    """`a` was used first, but only `b` could come back from the host."""
    world = World(slots=2, host_bytes=150)
    for name in "ab":
        world.want(name)
        world.now += 2.0
        world.finish(name)
        world.use(name)
        world.release(name)
    assert world.manager.host_used == 100
    assert world.manager.evict_one()
    assert world.placed == ["a"]


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


def replay_calls(calls: list[Call], *, block_s: float, token_s: float) -> Outcome:
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
        by_value = replay_calls(calls, **costs)
        others = []
        for policy in (prefixes_first, adapters_first):
            monkeypatch.setattr(KVCacheManager, "make_room", policy)
            others.append(replay_calls(calls, **costs))
            monkeypatch.undo()
        return by_value, others[0], others[1]

    return run


def test_hot_prefixes_stay_beside_many_adapters(compare: Callable[..., tuple[Outcome, Outcome, Outcome]]) -> None:
    by_value, prefixes_go, adapters_go = compare(mixed(600, prefix_tokens=80), block_s=0.004, token_s=0.001)
    assert by_value.prefix_hits > 1.5 * prefixes_go.prefix_hits
    assert by_value.adapter_hits > 1.1 * adapters_go.adapter_hits
    assert by_value.seconds < 0.9 * min(prefixes_go.seconds, adapters_go.seconds)


@pytest.mark.parametrize(("block_s", "token_s"), [(0.0001, 0.001), (0.1, 0.001)])
def test_neither_class_starves_where_the_other_is_costly(
    compare: Callable[..., tuple[Outcome, Outcome, Outcome]], block_s: float, token_s: float
) -> None:
    by_value, prefixes_go, adapters_go = compare(mixed(600, prefix_tokens=80), block_s=block_s, token_s=token_s)
    assert by_value.seconds < 1.05 * min(prefixes_go.seconds, adapters_go.seconds)
    assert by_value.prefix_hits > 0.1
    assert by_value.adapter_hits > 0.1


def test_what_was_hot_goes_when_the_traffic_changes() -> None:
    """The floor rises: prefixes that nobody asks for any more make way for adapters, however costly they were."""
    hot, later = mixed(300, prefix_tokens=80), [c for c in mixed(1500, prefix_tokens=80, seed=1) if c.adapter]
    costs = {"block_s": 0.004, "token_s": 0.001}
    alone, after = replay_calls(later, **costs), replay_calls(hot + later, **costs)
    placed_before = replay_calls(hot, **costs)
    num_hot = sum(c.adapter is not None for c in hot)
    misses = (1 - after.adapter_hits) * (num_hot + len(later)) - (1 - placed_before.adapter_hits) * num_hot
    assert misses < 1.3 * (1 - alone.adapter_hits) * len(later)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.none() | st.integers(0, 5)), max_size=300))
def test_the_least_is_first_whatever_was_set_and_removed(changes: list[tuple[str, int | None]]) -> None:
    queue: PriorityQueue[str] = PriorityQueue()
    known: dict[str, int] = {}  # the one that was set last stands last
    for item, key in changes:
        known.pop(item, None)
        if key is None:
            queue.discard(item)
        else:
            queue.set(item, key)
            known[item] = key
        assert queue.items() == known.keys()
        first = min(known, key=known.__getitem__, default=None)
        assert queue.peek() == (None if first is None else (known[first], first))


def test_stale_entries_do_not_pile_up() -> None:
    queue: PriorityQueue[str] = PriorityQueue()
    for i in range(10_000):
        queue.set("a", i)
    assert len(queue._heap) < 100
