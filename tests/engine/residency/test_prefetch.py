"""Adapters that are loaded before requests come: within the limits, in order, and without anything being dropped."""

from __future__ import annotations

from loray.engine.memory.adapter_manager import Tier
from loray.engine.memory.prefetch import Prefetch, Prefetched
from loray.errors import StoreError
from tests.engine.residency.world import Packed, World, ref


def prefetch(world: World, host_bytes: int = 1000) -> Prefetch[Packed, str]:
    return Prefetch(world.adapter_manager, host_bytes, lambda ref: len(world.placed) < world.slots)


def test_they_are_placed_as_they_come_and_the_rest_stays_on_the_host() -> None:
    world = World(slots=2)
    batch = prefetch(world)
    assert not batch.begin([ref(name) for name in "abc"])
    world.adapter_manager.poll()
    for name, placed in [("b", ["b"]), ("a", ["b", "a"]), ("c", ["b", "a"])]:
        world.finish(name)
        assert batch.look() == (name == "c")
        assert world.placed == placed
    assert batch.end() == Prefetched(num_in_pool=2, num_on_host=1)
    table = world.adapter_manager.table
    assert [table.tier(ref(name)) for name in "abc"] == [Tier.POOL, Tier.POOL, Tier.HOST]
    assert not table.waiters()
    assert not table.pins()
    counts = world.adapter_manager.counts
    assert (counts.num_loads, counts.num_misses, counts.num_pool_hits) == (3, 0, 0)
    assert [p.num_uses for p in table.placements()] == [0, 0, 0]
    table.check_integrity()


def test_what_does_not_fit_on_the_host_is_left_out_and_nothing_is_dropped_for_it() -> None:
    world = World(slots=9, host_bytes=350)
    held = world.bring("held")
    world.adapter_manager.release(held)
    batch = prefetch(world, host_bytes=350)
    batch.begin([held, ref("a"), ref("large", 200), ref("b"), ref("c")])
    world.adapter_manager.poll()
    assert set(world.loads) == {"held", "a", "b"}
    for name in "ab":
        world.finish(name)
    assert batch.look()
    assert batch.end() == Prefetched(num_in_pool=2)
    assert world.adapter_manager.table.tier(held) is Tier.POOL
    assert (world.adapter_manager.counts.num_evictions, world.adapter_manager.counts.num_host_evictions) == (0, 0)


def test_a_failed_load_and_one_that_is_late_leave_nothing_behind() -> None:
    world = World()
    batch = prefetch(world)
    batch.begin([ref("a"), ref("b")])
    world.adapter_manager.poll()
    world.loads["a"].set_exception(StoreError("away"))
    world.loads["b"].set_running_or_notify_cancel()
    world.adapter_manager.poll()
    assert not batch.look()
    assert batch.end() == Prefetched(num_failed=1, num_late=1)
    assert not world.adapter_manager.table.waiters()
    world.finish("b")  # its load had begun: the host keeps it
    assert world.adapter_manager.table.tier(ref("b")) is Tier.HOST
    assert ref("a").digest not in world.adapter_manager.table.entries
    world.adapter_manager.table.check_integrity()


def test_a_request_that_comes_meanwhile_waits_for_the_same_load() -> None:
    world = World()
    batch = prefetch(world)
    batch.begin([ref("a")])
    world.adapter_manager.poll()
    world.adapter_manager.add_waiter(ref("a"))
    world.finish("a")
    assert batch.look()
    assert world.num_loads == 1
    assert world.adapter_manager.acquire(ref("a")) == "a"
    assert world.adapter_manager.table.placements()[0].num_uses == 1
