"""Adapters that are loaded before requests come: within the limits, in order, and without anything being dropped."""

from __future__ import annotations

from loray.engine.memory.adapter_manager import Prefetch, Prefetched, Tier
from loray.errors import StoreError
from tests.fixtures.scheduling import Packed, World, ref


def prefetch(world: World, *names: str, host_bytes: int = 1000) -> Prefetch[Packed, str]:
    batch = Prefetch(world.manager, host_bytes, lambda ref: len(world.placed) < world.slots)
    assert not batch.begin([ref(name, 200 if name == "large" else 100) for name in names])
    world.manager.poll()
    return batch


def test_they_are_placed_as_they_come_and_the_rest_stays_on_the_host() -> None:
    world = World(slots=2)
    batch = prefetch(world, *"abc")
    for name, placed in [("b", ["b"]), ("a", ["b", "a"]), ("c", ["b", "a"])]:
        world.finish(name)
        assert batch.look() == (name == "c")
        assert world.placed == placed
    assert batch.end() == Prefetched(num_in_pool=2, num_on_host=1)
    assert [world.tier(name) for name in "abc"] == [Tier.POOL, Tier.POOL, Tier.HOST]
    assert not world.manager.waiters()
    assert not world.manager.pins()
    counts = world.manager.counts
    assert (counts.num_loads, counts.num_misses, counts.num_pool_hits) == (3, 0, 0)
    assert [p.num_uses for p in world.manager.placements()] == [0, 0, 0]
    world.manager.check_integrity()


def test_what_does_not_fit_on_the_host_is_left_out_and_nothing_is_dropped_for_it() -> None:
    world = World(slots=9, host_bytes=350)
    world.bring("held")
    world.release("held")
    batch = prefetch(world, "held", "a", "large", "b", "c", host_bytes=350)
    assert set(world.loads) == {"held", "a", "b"}
    for name in "ab":
        world.finish(name)
    assert batch.look()
    assert batch.end() == Prefetched(num_in_pool=2)
    assert world.tier("held") is Tier.POOL
    assert (world.manager.counts.num_evictions, world.manager.counts.num_host_evictions) == (0, 0)


def test_a_failed_load_and_one_that_is_late_leave_nothing_behind() -> None:
    batch = prefetch(world := World(), *"ab")
    world.loads["b"].set_running_or_notify_cancel()
    world.fail("a", StoreError("away"))
    assert not batch.look()
    assert batch.end() == Prefetched(num_failed=1, num_late=1)
    assert not world.manager.waiters()
    world.finish("b")  # its load had begun: the host keeps it
    assert world.tier("b") is Tier.HOST
    assert ref("a").digest not in world.manager.entries


def test_a_request_that_comes_meanwhile_waits_for_the_same_load() -> None:
    batch = prefetch(world := World(), "a")
    world.want("a")
    world.finish("a")
    assert batch.look()
    assert world.num_loads == 1
    assert world.manager.acquire(ref("a")) == "a"
    assert world.manager.placements()[0].num_uses == 1
