"""Adapters that are used while they arrive: placed, timed, late, and failing under way."""

from __future__ import annotations

from loray.engine.residency.arrival import Arrival
from loray.engine.residency.table import Tier
from loray.errors import IntegrityError
from tests.engine.residency.world import Packed, World, ref


class Coming:
    """An adapter "a" that has begun to arrive, wanted by one request."""

    def __init__(self, world: World) -> None:
        self.arrival = Arrival()
        world.residency.want(ref("a"))
        world.residency.poll()
        world.flights["a"].set_result(Packed(100, self.arrival))
        world.residency.poll()


def test_what_arrives_can_be_placed_and_is_timed_until_it_is_whole() -> None:
    world = World()
    coming = Coming(world)
    assert world.residency.table.tier(ref("a")) is Tier.HOST
    assert world.residency.acquire(ref("a")) == "a"
    world.residency.unwant(ref("a"))
    assert (world.residency.load_seconds.counts().num_values, world.residency.table.host_used) == (0, 100)
    world.now = 2.0
    coming.arrival.land()
    assert world.residency.poll()
    assert (world.residency.load_seconds.counts().sum, world.residency.counts.loaded_bytes) == (2.0, 100)
    assert not world.residency.poll()
    world.residency.table.check_integrity()


def test_what_arrives_is_not_dropped_from_the_host() -> None:
    world = World(slots=1, host_bytes=150)
    coming = Coming(world)
    world.residency.unwant(ref("a"))
    world.residency.want(ref("b"))
    world.residency.poll()
    assert list(world.flights) == ["a"]
    coming.arrival.land()
    world.residency.poll()
    assert list(world.flights) == ["a", "b"]
    world.residency.table.check_integrity()


def test_what_comes_late_is_loading_again_until_it_is_whole() -> None:
    world = World()
    coming = Coming(world)
    assert world.residency.acquire(ref("a"))
    coming.arrival.late = True
    assert world.residency.table.tier(ref("a")) is Tier.LOADING
    coming.arrival.land()
    world.residency.poll()
    assert world.residency.table.tier(ref("a")) is Tier.POOL


def test_what_fails_under_way_gives_its_blocks_back_when_nobody_runs_on_it() -> None:
    world = World()
    coming = Coming(world)
    assert world.residency.acquire(ref("a"))
    world.residency.want(ref("a"))
    for _ in range(2):
        world.residency.unwant(ref("a"))
    coming.arrival.fail(IntegrityError("damaged"))
    assert world.residency.poll()
    assert world.residency.table.tier(ref("a")) is Tier.FAILED
    assert isinstance(world.residency.table.error(ref("a")), IntegrityError)
    assert (world.placed, world.residency.table.host_used) == (["a"], 0)
    assert not world.residency.evict_one()
    world.residency.table.check_integrity()
    world.residency.release(ref("a"))
    assert world.placed == []
    world.residency.want(ref("a"))
    world.residency.poll()
    assert world.num_loads == 2


def test_what_fails_while_it_is_idle_leaves_no_trace() -> None:
    world = World()
    coming = Coming(world)
    assert world.residency.acquire(ref("a"))
    world.residency.unwant(ref("a"))
    world.residency.release(ref("a"))
    coming.arrival.fail(IntegrityError("damaged"))
    world.residency.poll()
    assert (world.placed, world.residency.table.host_used, world.residency.counts.failed_loads) == ([], 0, 1)
    assert world.residency.table.residents() == []
    world.residency.table.check_integrity()
