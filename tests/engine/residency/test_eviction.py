"""Which idle adapter is evicted: traces compared with least recently used, and the cases behind the formula."""

from __future__ import annotations

import random
from typing import NamedTuple

from loray.engine.memory.eviction import EvictionPolicy, EvictionScore
from tests.engine.residency.world import World, ref


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
            self.eviction.placed(score, self.items[i].seconds, self.items[i].size)
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


def test_the_costly_ones_stay_where_costs_differ() -> None:
    rng = random.Random(1)
    items = [Item(10, rng.choice([0.002, 0.1])) for _ in range(100)]
    lru, greedy = replay(items, power_law(100, 10_000, rng, 0.5), 300)
    assert greedy.seconds < 0.8 * lru.seconds


def test_what_is_not_used_any_more_goes_however_costly_it_was() -> None:
    items = [Item(1, 10.0), *[Item(1, 1.0)] * 4]
    pool = Pool(items, 3, greedy=True)
    pool.use(0)
    for i in range(200):
        pool.use(1 + i % 4)
    assert 0 not in pool.resident


def test_one_that_came_layer_by_layer_is_taken_to_cost_what_others_did() -> None:
    eviction = EvictionPolicy()
    measured, streamed = EvictionScore(), EvictionScore()
    eviction.placed(streamed, None, 4.0)
    eviction.placed(measured, 6.0, 2.0)
    for score in (measured, streamed):
        for _ in range(2):
            eviction.used(score)
    assert eviction.value(streamed, 4.0, on_host=True) == eviction.value(measured, 2.0, on_host=True) > 3.0


def test_without_measured_differences_the_least_recently_used_goes() -> None:
    world = World(slots=3)
    for name in "abc":
        world.adapter_manager.release(world.bring(name))
    world.adapter_manager.evict_one()
    assert world.placed == ["b", "c"]


def test_an_adapter_whose_host_copy_is_gone_is_worth_its_load() -> None:
    """`a` was used first, but only `b` could come back from the host."""
    world = World(slots=2, host_bytes=150)
    for name in "ab":
        world.adapter_manager.add_waiter(ref(name))
        world.adapter_manager.poll()
        world.now += 2.0
        world.finish(name)
        assert world.adapter_manager.acquire(ref(name))
        world.adapter_manager.remove_waiter(ref(name))
        world.adapter_manager.release(ref(name))
    assert world.adapter_manager.table.host_used == 100
    assert world.adapter_manager.evict_one()
    assert world.placed == ["a"]
