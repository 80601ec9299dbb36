"""Adapters whose rows are on their way to the pool."""

from __future__ import annotations

from loray.engine.memory.adapter_manager import Stage, Tier
from loray.spec import AdapterRef
from tests.engine.residency.world import World, ref


def on_its_way(world: World) -> AdapterRef:
    """An adapter on the host, whose rows will not be in the pool at once."""
    a = ref("a")
    world.slow.add("a")
    world.adapter_manager.add_waiter(a)
    world.adapter_manager.poll()
    assert not world.adapter_manager.place_ahead(a)  # it is not there yet
    world.finish("a")
    world.adapter_manager.table.take_changed()
    return a


def test_an_adapter_is_pinned_when_its_rows_have_arrived() -> None:
    a = on_its_way(world := World())
    assert world.adapter_manager.acquire(a) is None
    assert world.placed == ["a"]
    assert world.adapter_manager.table.tier(a) is Tier.LOADING
    world.adapter_manager.table.check_integrity()
    assert not world.adapter_manager.poll()
    assert world.adapter_manager.acquire(a) is None
    world.slow.clear()
    assert world.adapter_manager.poll()
    assert set(world.adapter_manager.table.take_changed()) == {a.digest}
    assert world.adapter_manager.acquire(a) == "a"
    assert world.placed == ["a"]
    world.adapter_manager.table.check_integrity()


def test_nothing_waits_for_rows_where_no_step_runs() -> None:
    a = on_its_way(world := World())
    assert world.adapter_manager.acquire(a) is None
    assert world.adapter_manager.poll(at_once=True)
    assert world.adapter_manager.acquire(a) == "a"


def test_an_adapter_may_be_placed_before_it_can_be_used_and_leave_again() -> None:
    a = on_its_way(world := World())
    assert world.adapter_manager.place_ahead(a)
    assert not world.adapter_manager.place_ahead(a)
    assert world.placed == ["a"]
    world.adapter_manager.table.take_changed()
    assert world.adapter_manager.evict_one()
    assert not world.adapter_manager.table.at[Stage.COPYING]
    assert world.adapter_manager.table.tier(a) is Tier.HOST
    assert set(world.adapter_manager.table.take_changed()) == {a.digest}
    world.adapter_manager.table.check_integrity()
