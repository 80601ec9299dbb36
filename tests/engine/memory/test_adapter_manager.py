"""Adapters on the host and in the pool: one load for all, bounded bytes, pins, copies under way, failures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loray.engine.memory.adapter_manager import Backoff, Placement, Tier
from loray.engine.metrics import ResidencyCounts
from loray.errors import IntegrityError, StoreError, UnsupportedError
from loray.spec import AdapterRef
from tests.fixtures.scheduling import Pair, World, ref

DAMAGED = IntegrityError("damaged")


def test_one_load_for_many_requests() -> None:
    world = World()
    world.want(*"aaa")
    assert world.num_loads == 1
    assert world.tier("a") is Tier.LOADING
    assert world.manager.acquire(ref("a")) is None
    world.finish("a")
    assert world.tier("a") is Tier.HOST
    assert [world.manager.acquire(ref("a")) for _ in range(3)] == ["a"] * 3
    assert world.placed == ["a"]


def test_pinned_adapters_stay_and_the_least_recently_used_idle_one_goes() -> None:
    world = World(slots=3)
    world.bring(*"abc")
    world.release(*"ba")
    assert world.manager.evict_one()
    assert world.placed == ["b", "c"]
    assert world.manager.evict_one()
    assert not world.manager.evict_one()
    assert world.placed == ["c"]
    assert world.tier("a") is Tier.HOST
    assert world.manager.pins() == {ref("c").digest: 1}


def test_a_failed_load_fails_those_who_wait_and_is_tried_again_later() -> None:
    world = World()
    world.want("a")
    world.fail("a", DAMAGED)
    for _ in range(2):
        assert world.tier("a") is Tier.FAILED
        assert isinstance(world.manager.error(ref("a")), IntegrityError)
        world.leave("a")
        world.want("a")
    world.leave("a")
    world.now += 61
    world.want("a")
    assert world.tier("a") is Tier.LOADING
    assert world.num_loads == 2


def test_a_cancelled_load_has_no_result() -> None:
    world = World()
    for _ in range(2):
        world.want("a")
        world.leave("a")
    world.manager.add_waiter(ref("a"))
    assert not world.manager.poll()
    world.finish("a")
    assert world.num_loads == 3
    assert world.tier("a") is Tier.HOST


def test_a_load_that_lacks_room_is_tried_when_room_may_have_come() -> None:
    """Two needed copies fill the host; each byte that may go counts, however it becomes free."""
    world = World(slots=9, host_bytes=200)
    for name in "ab":
        world.want(name)
        world.finish(name)
    world.want("c", nbytes=150)
    assert "c" not in world.loads
    for name, started in (("a", False), ("b", True)):
        world.use(name)
        world.manager.poll()
        assert ("c" in world.loads) is started
    World(host_bytes=10).bring("a")  # one adapter larger than the host comes in all the same


def test_the_host_keeps_within_its_bytes() -> None:
    world = World(slots=1, host_bytes=250)
    for name in "abcd":
        world.bring(name)
        world.release(name)
        world.manager.evict_one()
        assert world.manager.host_used <= 250
    assert list(world.manager.at[Tier.HOST]) == [ref("c").digest, ref("d").digest]


def test_a_load_nobody_waits_for_is_not_started() -> None:
    world = World(host_bytes=100)
    world.want(*"ab")
    world.leave("b")
    world.finish("a")
    assert list(world.loads) == ["a"]


def test_a_load_that_does_not_fit_throws_nothing_out_and_is_not_overtaken() -> None:
    world = World(slots=9, host_bytes=1000)
    world.bring(*"abc")
    world.release(*"abc")
    world.want("loading", nbytes=300)
    world.want("large", nbytes=800)
    world.want("small", nbytes=50)
    assert world.manager.host_used == 600
    assert "small" not in world.loads
    world.finish("loading", 300)
    world.use("loading")
    world.manager.poll()
    assert "large" in world.loads


def test_a_pair_is_counted_once_and_goes_with_the_last_that_shares_it() -> None:
    world, pair = World(slots=9, host_bytes=1000), Pair("p", 500)
    for name in "abc":
        world.want(name)
        world.finish(name, pair=pair if name != "c" else None)
        world.use(name)
    assert world.manager.host_used == 3 * 100 + 500
    world.want("d", nbytes=300)
    assert world.manager.host_used == 2 * 100 + 500 + 300  # without the first alone
    world.want("e", nbytes=600)
    assert "e" in world.loads  # without the second the pair is gone too
    assert world.manager.host_used == 100 + 300 + 600


def test_what_turns_out_larger_than_published_throws_out_what_nobody_waits_for() -> None:
    world = World(slots=9, host_bytes=300)
    world.bring(*"abc")
    world.release(*"abc")
    world.want("d", nbytes=10)
    world.finish("d", 10, pair=Pair("p", 150))
    assert world.manager.host_used == 260
    assert world.manager.counts.num_host_evictions == 2


def test_an_adapter_that_cannot_be_placed_fails_alone() -> None:
    world = World()
    world.want("a")
    world.finish("a")
    world.manager._place = lambda ref, packed: (_ for _ in ()).throw(IndexError("layer 40"))
    assert world.manager.acquire(ref("a")) is None
    assert world.tier("a") is Tier.FAILED
    world.leave("a")
    assert world.manager.host_used == 0


def test_a_request_is_a_hit_or_a_miss_where_its_adapter_is_when_it_comes() -> None:
    world = World(slots=1, host_bytes=150)
    manager = world.manager
    world.want(*"aa")  # the second waits for the load of the first: neither found it here
    world.finish("a", 120)
    assert manager.acquire(ref("a"))
    world.want("a")
    manager.add_waiter(ref("a"), again=True)  # preempted
    world.leave(*"aaaa")
    world.release("a")
    assert manager.evict_one()
    world.want("a")
    world.leave("a")
    world.bring("b")
    assert manager.counts == ResidencyCounts(
        num_pool_hits=1,
        num_host_hits=1,
        num_misses=3,
        num_loads=2,
        num_loaded_bytes=220,
        num_evictions=1,
        num_host_evictions=1,
    )
    places = world.manager.placements()
    assert [(p.ref.name, p.place, p.num_uses) for p in places] == [("b", "pool", 1), ("a", None, 4)]
    assert [p.ref.name for p in world.manager.placements([ref("a").digest, "unheard of"])] == ["a"]


def test_loads_are_timed_from_their_start_and_failures_are_not() -> None:
    world = World(slots=2, host_bytes=100)
    world.want(*"ab")  # b has no room until a's copy may go
    assert list(world.loads) == ["a"]
    world.now = 3.0
    world.finish("a")
    assert list(world.loads) == ["a"]  # wanted still, so nothing gives way
    world.use("a")
    world.manager.poll()
    world.now = 3.5
    world.finish("b")
    world.manager.add_waiter(ref("c"))
    world.use("b")
    world.manager.poll()
    world.fail("c", DAMAGED)
    load_seconds = world.manager.load_seconds.counts()
    assert (sum(load_seconds.counts), load_seconds.sum) == (2, 3.5)
    assert world.manager.counts.num_failed_loads == 1
    (place,) = world.manager.placements([ref("c").digest])
    assert (place.place, place.last_used_at) == (None, 1003.5)


def test_uses_outlive_the_adapter_and_go_on_when_it_comes_back() -> None:
    world = World()
    manager = world.manager

    def once(of: AdapterRef, num_tokens: int) -> Placement:
        manager.add_waiter(of)
        world.now += 1
        manager.request_ended(of, num_tokens)
        manager.remove_waiter(of)
        (place,) = manager.placements()
        return place

    a, renamed = ref("a"), replace(ref("a"), name="b")
    assert once(a, 30) == Placement(a, None, num_uses=1, last_used_at=1001.0, num_tokens=30)
    assert once(renamed, 5) == Placement(renamed, None, num_uses=2, last_used_at=1002.0, num_tokens=35)


def test_what_is_held_is_never_forgotten_and_of_the_others_the_longest_gone_is() -> None:
    forgotten: list[str] = []
    manager = World(num_usages=2, on_forget=forgotten.append).manager
    for name in "abcde":
        manager.add_waiter(ref(name))
    for name in "bca":
        manager.remove_waiter(ref(name))
    assert [p.ref.name for p in manager.placements()] == ["d", "e", "c", "a"]
    assert manager.placements([ref("b").digest]) == []
    manager.add_waiter(ref("c"))
    manager.remove_waiter(ref("c"))
    manager.remove_waiter(ref("d"))
    assert [p.ref.name for p in manager.placements()] == ["e", "c", "d"]
    assert forgotten == [ref("b").digest, ref("a").digest]


# Failed loads are tried again later and later, and requests in between get the stored error.


def waits(error: Exception, num_failures: int) -> list[float]:
    """Seconds for which each of so many failures in a row stands."""
    now, out = 0.0, []
    backoff = Backoff(lambda: now)
    for _ in range(num_failures):
        backoff.failed("a", error)
        began = now
        while backoff.error("a") is not None:
            now += 0.5
        out.append(now - began)
    return out


def test_the_time_doubles_up_to_a_limit_which_is_longer_for_what_lies_in_the_bytes() -> None:
    assert waits(StoreError("no answer"), 8) == [1, 2, 4, 8, 16, 32, 60, 60]
    assert waits(OSError("cannot be read"), 2) == [1, 2]
    for error in (DAMAGED, UnsupportedError("no such method")):
        assert waits(error, 5) == [60, 120, 240, 480, 600]


def retry_after(backoff: Backoff) -> float | None:
    error = backoff.error("a")
    assert isinstance(error, StoreError)
    assert str(error).startswith("no answer")
    return error.retry_after_s


def test_a_store_error_says_when_to_try_again_and_others_are_told_as_they_were() -> None:
    now = 0.0
    backoff = Backoff(lambda: now)
    backoff.failed("a", StoreError("no answer"))
    backoff.failed("b", DAMAGED)
    now = 0.25
    assert retry_after(backoff) == 0.75
    assert backoff.error("b") is DAMAGED
    assert backoff.error("c") is None


@pytest.mark.parametrize("seconds", [None, 1000.0])
def test_a_success_and_a_long_time_without_failures_begin_anew(seconds: float | None) -> None:
    now = 0.0
    backoff = Backoff(lambda: now)
    for _ in range(5):
        backoff.failed("a", StoreError("no answer"))
    if seconds is None:
        backoff.succeeded("a")
    else:
        now += seconds
    backoff.failed("a", StoreError("no answer"))
    assert retry_after(backoff) == 1.0


def test_many_requests_for_what_cannot_be_loaded_are_few_loads() -> None:
    """One request every 0.1 s for two minutes: the store is asked 7 times, not 1,200."""
    world = World()
    for _ in range(1200):
        world.want("a")
        if world.tier("a") is Tier.LOADING:
            world.fail("a", StoreError("no answer"))
        assert world.tier("a") is Tier.FAILED
        assert isinstance(world.manager.error(ref("a")), StoreError)
        world.leave("a")
        world.now += 0.1
    assert world.num_loads == world.manager.counts.num_failed_loads == 7


# Adapters whose rows are on their way to the pool.


def on_its_way(world: World) -> None:
    """An adapter "a" on the host, whose rows will not be in the pool at once."""
    world.slow.add("a")
    world.want("a")
    assert not world.manager.place_ahead(ref("a"))  # it is not there yet
    world.finish("a")
    world.manager.take_changed()


def test_an_adapter_is_pinned_when_its_rows_have_arrived() -> None:
    on_its_way(world := World())
    assert world.manager.acquire(ref("a")) is None
    assert world.placed == ["a"]
    assert world.tier("a") is Tier.COPYING
    assert not world.manager.poll()
    assert world.manager.acquire(ref("a")) is None
    world.slow.clear()
    assert world.manager.poll()
    assert set(world.manager.take_changed()) == {ref("a").digest}
    assert world.manager.acquire(ref("a")) == "a"
    assert world.placed == ["a"]
    world.manager.check_integrity()


def test_nothing_waits_for_rows_where_no_step_runs() -> None:
    on_its_way(world := World())
    assert world.manager.acquire(ref("a")) is None
    assert world.manager.poll(at_once=True)
    assert world.manager.acquire(ref("a")) == "a"


def test_an_adapter_may_be_placed_before_it_can_be_used_and_leave_again() -> None:
    on_its_way(world := World())
    assert world.manager.place_ahead(ref("a"))
    assert not world.manager.place_ahead(ref("a"))
    assert world.placed == ["a"]
    world.manager.take_changed()
    assert world.manager.evict_one()
    assert not world.manager.at[Tier.COPYING]
    assert world.tier("a") is Tier.HOST
    assert set(world.manager.take_changed()) == {ref("a").digest}
    world.manager.check_integrity()
