"""Adapters that are used before they are complete: placed, timed, late and failing."""

from __future__ import annotations

from loray.engine.memory.adapter_manager import Tier
from loray.engine.residency.partial import PartialLoad
from loray.errors import IntegrityError
from tests.engine.residency.world import Packed, World, ref


class Partial:
    """An adapter "a" that is usable and not complete, wanted by one request."""

    def __init__(self, world: World) -> None:
        self.load = PartialLoad()
        world.residency.want(ref("a"))
        world.residency.poll()
        world.loads["a"].set_result(Packed(100, self.load))
        world.residency.poll()


def test_a_partial_adapter_can_be_placed_and_is_timed_until_it_is_complete() -> None:
    world = World()
    adapter = Partial(world)
    assert world.residency.table.tier(ref("a")) is Tier.HOST
    assert world.residency.acquire(ref("a")) == "a"
    world.residency.unwant(ref("a"))
    assert (sum(world.residency.load_seconds.counts().counts), world.residency.table.host_used) == (0, 100)
    world.now = 2.0
    adapter.load.finish()
    assert world.residency.poll()
    assert (world.residency.load_seconds.counts().sum, world.residency.counts.num_loaded_bytes) == (2.0, 100)
    assert not world.residency.poll()
    world.residency.table.check_integrity()


def test_a_partial_adapter_is_not_dropped_from_the_host() -> None:
    world = World(slots=1, host_bytes=150)
    adapter = Partial(world)
    world.residency.unwant(ref("a"))
    world.residency.want(ref("b"))
    world.residency.poll()
    assert list(world.loads) == ["a"]
    adapter.load.finish()
    world.residency.poll()
    assert list(world.loads) == ["a", "b"]
    world.residency.table.check_integrity()


def test_what_comes_late_is_loading_again_until_it_is_complete() -> None:
    world = World()
    adapter = Partial(world)
    assert world.residency.acquire(ref("a"))
    adapter.load.late = True
    assert world.residency.table.tier(ref("a")) is Tier.LOADING
    adapter.load.finish()
    world.residency.poll()
    assert world.residency.table.tier(ref("a")) is Tier.POOL


def test_a_partial_adapter_that_fails_frees_its_blocks_when_no_request_runs_with_it() -> None:
    world = World()
    adapter = Partial(world)
    assert world.residency.acquire(ref("a"))
    world.residency.want(ref("a"))
    for _ in range(2):
        world.residency.unwant(ref("a"))
    adapter.load.fail(IntegrityError("damaged"))
    assert world.residency.poll()
    assert world.residency.table.tier(ref("a")) is Tier.FAILED
    assert isinstance(world.residency.table.error(ref("a")), IntegrityError)
    assert (world.placed, world.residency.table.host_used) == (["a"], 0)
    assert not world.residency.evict_one()
    world.residency.table.check_integrity()
    world.residency.release(ref("a"))
    assert world.placed == []
    world.now += 61
    world.residency.want(ref("a"))
    world.residency.poll()
    assert world.num_loads == 2


def test_what_fails_while_it_is_idle_leaves_no_trace() -> None:
    world = World()
    adapter = Partial(world)
    assert world.residency.acquire(ref("a"))
    world.residency.unwant(ref("a"))
    world.residency.release(ref("a"))
    adapter.load.fail(IntegrityError("damaged"))
    world.residency.poll()
    assert (world.placed, world.residency.table.host_used, world.residency.counts.num_failed_loads) == ([], 0, 1)
    assert world.residency.table.residents() == []
    world.residency.table.check_integrity()
