"""Adapters that are used before they are complete: placed, timed, late and failing."""

from __future__ import annotations

from loray.engine.memory.adapter_manager import Tier
from loray.engine.memory.partial import PartialLoad
from loray.errors import IntegrityError
from tests.engine.residency.world import Packed, World, ref


class Partial:
    """An adapter "a" that is usable and not complete, wanted by one request."""

    def __init__(self, world: World) -> None:
        self.load = PartialLoad()
        world.adapter_manager.add_waiter(ref("a"))
        world.adapter_manager.poll()
        world.loads["a"].set_result(Packed(100, self.load))
        world.adapter_manager.poll()


def test_a_partial_adapter_can_be_placed_and_is_timed_until_it_is_complete() -> None:
    world = World()
    adapter = Partial(world)
    assert world.adapter_manager.table.tier(ref("a")) is Tier.HOST
    assert world.adapter_manager.acquire(ref("a")) == "a"
    world.adapter_manager.remove_waiter(ref("a"))
    assert (sum(world.adapter_manager.load_seconds.counts().counts), world.adapter_manager.table.host_used) == (0, 100)
    world.now = 2.0
    adapter.load.finish()
    assert world.adapter_manager.poll()
    assert (world.adapter_manager.load_seconds.counts().sum, world.adapter_manager.counts.num_loaded_bytes) == (
        2.0,
        100,
    )
    assert not world.adapter_manager.poll()
    world.adapter_manager.table.check_integrity()


def test_a_partial_adapter_is_not_dropped_from_the_host() -> None:
    world = World(slots=1, host_bytes=150)
    adapter = Partial(world)
    world.adapter_manager.remove_waiter(ref("a"))
    world.adapter_manager.add_waiter(ref("b"))
    world.adapter_manager.poll()
    assert list(world.loads) == ["a"]
    adapter.load.finish()
    world.adapter_manager.poll()
    assert list(world.loads) == ["a", "b"]
    world.adapter_manager.table.check_integrity()


def test_what_comes_late_is_loading_again_until_it_is_complete() -> None:
    world = World()
    adapter = Partial(world)
    assert world.adapter_manager.acquire(ref("a"))
    adapter.load.late = True
    assert world.adapter_manager.table.tier(ref("a")) is Tier.LOADING
    adapter.load.finish()
    world.adapter_manager.poll()
    assert world.adapter_manager.table.tier(ref("a")) is Tier.POOL


def test_a_partial_adapter_that_fails_frees_its_blocks_when_no_request_runs_with_it() -> None:
    world = World()
    adapter = Partial(world)
    assert world.adapter_manager.acquire(ref("a"))
    world.adapter_manager.add_waiter(ref("a"))
    for _ in range(2):
        world.adapter_manager.remove_waiter(ref("a"))
    adapter.load.fail(IntegrityError("damaged"))
    assert world.adapter_manager.poll()
    assert world.adapter_manager.table.tier(ref("a")) is Tier.FAILED
    assert isinstance(world.adapter_manager.table.error(ref("a")), IntegrityError)
    assert (world.placed, world.adapter_manager.table.host_used) == (["a"], 0)
    assert not world.adapter_manager.evict_one()
    world.adapter_manager.table.check_integrity()
    world.adapter_manager.release(ref("a"))
    assert world.placed == []
    world.now += 61
    world.adapter_manager.add_waiter(ref("a"))
    world.adapter_manager.poll()
    assert world.num_loads == 2


def test_what_fails_while_it_is_idle_leaves_no_trace() -> None:
    world = World()
    adapter = Partial(world)
    assert world.adapter_manager.acquire(ref("a"))
    world.adapter_manager.remove_waiter(ref("a"))
    world.adapter_manager.release(ref("a"))
    adapter.load.fail(IntegrityError("damaged"))
    world.adapter_manager.poll()
    assert (world.placed, world.adapter_manager.table.host_used, world.adapter_manager.counts.num_failed_loads) == (
        [],
        0,
        1,
    )
    assert world.adapter_manager.table.residents() == []
    world.adapter_manager.table.check_integrity()
