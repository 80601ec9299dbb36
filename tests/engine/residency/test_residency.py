"""Residency: one load, bounded host, pins, least recently used out, failures that leave no trace."""

from __future__ import annotations

import pytest

from loray.engine.memory.adapter_manager import Tier
from loray.engine.metrics import ResidencyCounts
from loray.errors import IntegrityError
from tests.engine.residency.world import Packed, Pair, World, ref


def test_one_load_for_many_requests() -> None:
    world = World()
    for _ in range(3):
        world.adapter_manager.add_waiter(ref("a"))
        world.adapter_manager.poll()
    assert world.num_loads == 1
    assert world.adapter_manager.table.tier(ref("a")) is Tier.LOADING
    assert world.adapter_manager.acquire(ref("a")) is None
    world.finish("a")
    assert world.adapter_manager.table.tier(ref("a")) is Tier.HOST
    assert [world.adapter_manager.acquire(ref("a")) for _ in range(3)] == ["a"] * 3
    assert world.placed == ["a"]


def test_pinned_adapters_stay_and_the_least_recently_used_idle_one_goes() -> None:
    world = World(slots=3)
    a, b, c = (world.bring(n) for n in "abc")
    world.adapter_manager.release(b)
    world.adapter_manager.release(a)
    assert world.adapter_manager.evict_one()
    assert world.placed == ["b", "c"]
    assert world.adapter_manager.evict_one()
    assert not world.adapter_manager.evict_one()
    assert world.placed == ["c"]
    assert world.adapter_manager.table.tier(a) is Tier.HOST
    assert world.adapter_manager.table.pins() == {c.digest: 1}


def test_a_failed_load_fails_those_who_wait_and_is_tried_again_later() -> None:
    world = World()
    world.adapter_manager.add_waiter(ref("a"))
    world.adapter_manager.poll()
    world.loads["a"].set_exception(IntegrityError("damaged"))
    world.adapter_manager.poll()
    assert world.adapter_manager.table.tier(ref("a")) is Tier.FAILED
    assert isinstance(world.adapter_manager.table.error(ref("a")), IntegrityError)
    world.adapter_manager.remove_waiter(ref("a"))
    world.adapter_manager.add_waiter(ref("a"))
    assert world.adapter_manager.table.tier(ref("a")) is Tier.FAILED
    assert isinstance(world.adapter_manager.table.error(ref("a")), IntegrityError)
    world.adapter_manager.remove_waiter(ref("a"))
    world.now += 61
    world.adapter_manager.add_waiter(ref("a"))
    assert world.adapter_manager.table.tier(ref("a")) is Tier.LOADING
    world.adapter_manager.poll()
    assert world.num_loads == 2
    world.adapter_manager.table.check_integrity()


def test_a_cancelled_load_has_no_result() -> None:
    world = World()
    for _ in range(2):
        world.adapter_manager.add_waiter(ref("a"))
        world.adapter_manager.poll()
        world.adapter_manager.remove_waiter(ref("a"))
    world.adapter_manager.add_waiter(ref("a"))
    assert not world.adapter_manager.poll()
    world.finish("a")
    assert world.num_loads == 3
    assert world.adapter_manager.table.tier(ref("a")) is Tier.HOST
    world.adapter_manager.table.check_integrity()


def test_a_load_that_lacks_room_is_tried_when_room_may_have_come() -> None:
    """Two needed copies fill the host; each byte that may go counts, however it becomes free."""
    world = World(slots=9, host_bytes=200)
    for name in "ab":
        world.adapter_manager.add_waiter(ref(name))
        world.adapter_manager.poll()
        world.finish(name)
    world.adapter_manager.add_waiter(ref("c", 150))
    world.adapter_manager.poll()
    assert "c" not in world.loads
    for name, started in (("a", False), ("b", True)):
        assert world.adapter_manager.acquire(ref(name))
        world.adapter_manager.remove_waiter(ref(name))
        world.adapter_manager.poll()
        assert ("c" in world.loads) is started
    world.adapter_manager.table.check_integrity()


def test_the_host_keeps_within_its_bytes() -> None:
    world = World(slots=1, host_bytes=250)
    for name in "abcd":
        r = world.bring(name)
        world.adapter_manager.release(r)
        world.adapter_manager.evict_one()
        assert world.adapter_manager.table.host_used <= 250
    assert [r.name for r in world.adapter_manager.table.by_tier()[Tier.HOST]] == ["c", "d"]


def test_a_full_host_delays_loads_until_room_is_made() -> None:
    world = World(slots=1, host_bytes=150)
    world.adapter_manager.add_waiter(ref("a"))
    world.adapter_manager.add_waiter(ref("b"))
    world.adapter_manager.poll()
    assert list(world.loads) == ["a"]
    world.finish("a")
    assert list(world.loads) == ["a"]  # wanted still, so nothing gives way
    assert world.adapter_manager.acquire(ref("a"))
    world.adapter_manager.remove_waiter(ref("a"))
    world.adapter_manager.poll()
    assert list(world.loads) == ["a", "b"]


def test_one_adapter_larger_than_the_host_still_comes_in() -> None:
    world = World(host_bytes=10)
    assert world.bring("a")


def test_an_error_needs_a_failure() -> None:
    world = World()
    world.adapter_manager.add_waiter(ref("a"))
    with pytest.raises(AssertionError):
        world.adapter_manager.table.error(ref("a"))


def test_a_load_nobody_waits_for_is_not_started() -> None:
    world = World(host_bytes=100)
    for name in "ab":
        world.adapter_manager.add_waiter(ref(name))
    world.adapter_manager.poll()
    world.adapter_manager.remove_waiter(ref("b"))
    world.finish("a")
    assert list(world.loads) == ["a"]
    world.adapter_manager.table.check_integrity()


def test_a_load_that_does_not_fit_throws_nothing_out_and_is_not_overtaken() -> None:
    world = World(slots=9, host_bytes=1000)
    for name in "abc":
        world.adapter_manager.release(world.bring(name))
    world.adapter_manager.add_waiter(ref("loading", 300))
    world.adapter_manager.poll()
    world.adapter_manager.add_waiter(ref("large", 800))
    world.adapter_manager.add_waiter(ref("small", 50))
    world.adapter_manager.poll()
    assert world.adapter_manager.table.host_used == 600
    assert "small" not in world.loads
    world.finish("loading", 300)
    assert world.adapter_manager.acquire(ref("loading"))
    world.adapter_manager.remove_waiter(ref("loading"))
    world.adapter_manager.poll()
    assert "large" in world.loads
    world.adapter_manager.table.check_integrity()


def test_what_is_needed_by_earlier_requests_stays_and_by_later_ones_makes_way() -> None:
    """The host holds two small adapters, for each of which a request always waits; the pool holds one of them."""
    world = World(slots=1, host_bytes=200)
    adapter_manager, a, b, large = world.adapter_manager, ref("a"), ref("b"), ref("large", 200)
    for r in (a, b):
        adapter_manager.add_waiter(r)
        adapter_manager.poll()
        world.finish(r.name)
    adapter_manager.add_waiter(large)
    for r in (a, b):  # later requests for the same
        adapter_manager.add_waiter(r)
    adapter_manager.poll()
    assert "large" not in world.loads
    for r in (a, b):  # the earlier ones have their turn
        assert adapter_manager.acquire(r)
        adapter_manager.remove_waiter(r)
        adapter_manager.release(r)
        assert adapter_manager.evict_one()
    adapter_manager.poll()
    assert "large" in world.loads
    assert adapter_manager.table.tier(a) is adapter_manager.table.tier(b) is Tier.LOADING
    adapter_manager.table.check_integrity()
    world.finish("large", 200)
    adapter_manager.poll()
    assert adapter_manager.table.host_used == 200  # it waits for its turn, and nobody came before
    assert adapter_manager.acquire(large)
    adapter_manager.remove_waiter(large)
    adapter_manager.poll()
    assert world.num_loads == 5
    assert adapter_manager.table.host_used == 200
    adapter_manager.table.check_integrity()


def test_a_pair_is_counted_once_and_goes_with_the_last_that_shares_it() -> None:
    world = World(slots=9, host_bytes=1000)
    adapter_manager, pair = world.adapter_manager, Pair("p", 500)
    for name in "abc":
        r = ref(name)
        adapter_manager.add_waiter(r)
        adapter_manager.poll()
        world.loads[name].set_result(Packed(100, pair=pair if name != "c" else None))
        adapter_manager.poll()
        assert adapter_manager.acquire(r)
        adapter_manager.remove_waiter(r)
        adapter_manager.table.check_integrity()
    assert adapter_manager.table.host_used == 3 * 100 + 500
    adapter_manager.add_waiter(ref("d", 300))
    adapter_manager.poll()
    assert adapter_manager.table.host_used == 2 * 100 + 500 + 300  # without the first alone
    adapter_manager.add_waiter(ref("e", 600))
    adapter_manager.poll()
    assert "e" in world.loads  # without the second the pair is gone too
    assert adapter_manager.table.host_used == 100 + 300 + 600
    adapter_manager.table.check_integrity()


def test_what_turns_out_larger_than_published_throws_out_what_nobody_waits_for() -> None:
    world = World(slots=9, host_bytes=300)
    for name in "abc":
        world.adapter_manager.release(world.bring(name))
    world.adapter_manager.add_waiter(ref("d", 10))
    world.adapter_manager.poll()
    world.loads["d"].set_result(Packed(10, pair=Pair("p", 150)))
    world.adapter_manager.poll()
    assert world.adapter_manager.table.host_used == 260
    assert world.adapter_manager.counts.num_host_evictions == 2
    world.adapter_manager.table.check_integrity()


def test_an_adapter_that_cannot_be_placed_fails_alone() -> None:
    world = World()
    world.adapter_manager.add_waiter(ref("a"))
    world.adapter_manager.poll()
    world.finish("a")
    world.adapter_manager._place = lambda ref, packed: (_ for _ in ()).throw(IndexError("layer 40"))
    assert world.adapter_manager.acquire(ref("a")) is None
    assert world.adapter_manager.table.tier(ref("a")) is Tier.FAILED
    world.adapter_manager.remove_waiter(ref("a"))
    assert world.adapter_manager.table.host_used == 0
    world.adapter_manager.table.check_integrity()


def test_a_request_is_a_hit_or_a_miss_where_its_adapter_is_when_it_comes() -> None:
    world = World(slots=1, host_bytes=150)
    adapter_manager = world.adapter_manager
    a, b = ref("a"), ref("b")
    for _ in range(2):  # the second waits for the load of the first: neither found it here
        adapter_manager.add_waiter(a)
    adapter_manager.poll()
    world.finish("a", 120)
    assert adapter_manager.acquire(a)
    adapter_manager.add_waiter(a)
    adapter_manager.add_waiter(a, again=True)  # preempted
    for _ in range(4):
        adapter_manager.remove_waiter(a)
    adapter_manager.release(a)
    assert adapter_manager.evict_one()
    adapter_manager.add_waiter(a)
    adapter_manager.remove_waiter(a)
    world.bring("b")
    assert adapter_manager.counts == ResidencyCounts(
        num_pool_hits=1,
        num_host_hits=1,
        num_misses=3,
        num_loads=2,
        num_loaded_bytes=220,
        num_evictions=1,
        num_host_evictions=1,
    )
    assert [(p.ref.name, p.tier, p.num_uses) for p in adapter_manager.table.placements()] == [
        ("b", Tier.POOL, 1),
        ("a", None, 4),
    ]
    assert [p.ref.name for p in adapter_manager.table.placements([a.digest, "unheard of"])] == ["a"]
    adapter_manager.release(b)
    adapter_manager.table.check_integrity()


def test_loads_are_timed_from_their_start_and_failures_are_not() -> None:
    world = World(slots=2, host_bytes=100)
    for name in "ab":  # b has no room until a's copy may go
        world.adapter_manager.add_waiter(ref(name))
    world.adapter_manager.poll()
    world.now = 3.0
    world.finish("a")
    assert world.adapter_manager.acquire(ref("a"))
    world.adapter_manager.remove_waiter(ref("a"))
    world.adapter_manager.poll()
    world.now = 3.5
    world.finish("b")
    world.adapter_manager.add_waiter(ref("c"))
    assert world.adapter_manager.acquire(ref("b"))
    world.adapter_manager.remove_waiter(ref("b"))
    world.adapter_manager.poll()
    world.loads["c"].set_exception(IntegrityError("damaged"))
    world.adapter_manager.poll()
    load_seconds = world.adapter_manager.load_seconds.counts()
    assert (sum(load_seconds.counts), load_seconds.sum) == (2, 3.5)
    assert world.adapter_manager.counts.num_failed_loads == 1
    (place,) = world.adapter_manager.table.placements([ref("c").digest])
    assert (place.tier, place.last_used_at) == (None, 1003.5)
