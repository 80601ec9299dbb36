"""Adapters whose rows are on their way to the pool."""

from __future__ import annotations

from loray.engine.memory.adapter_manager import Stage, Tier
from loray.spec import AdapterRef
from tests.engine.residency.world import World, ref


def on_its_way(world: World) -> AdapterRef:
    """An adapter on the host, whose rows will not be in the pool at once."""
    a = ref("a")
    world.slow.add("a")
    world.residency.want(a)
    world.residency.poll()
    assert not world.residency.place_ahead(a)  # it is not there yet
    world.finish("a")
    world.residency.take_changed()
    return a


def test_an_adapter_is_pinned_when_its_rows_have_arrived() -> None:
    a = on_its_way(world := World())
    assert world.residency.acquire(a) is None
    assert world.placed == ["a"]
    assert world.residency.table.tier(a) is Tier.LOADING
    world.residency.table.check_integrity()
    assert not world.residency.poll()
    assert world.residency.acquire(a) is None
    world.slow.clear()
    assert world.residency.poll()
    assert set(world.residency.take_changed()) == {a.digest}
    assert world.residency.acquire(a) == "a"
    assert world.placed == ["a"]
    world.residency.table.check_integrity()


def test_nothing_waits_for_rows_where_no_step_runs() -> None:
    a = on_its_way(world := World())
    assert world.residency.acquire(a) is None
    assert world.residency.poll(at_once=True)
    assert world.residency.acquire(a) == "a"


def test_an_adapter_may_be_placed_before_it_can_be_used_and_leave_again() -> None:
    a = on_its_way(world := World())
    assert world.residency.place_ahead(a)
    assert not world.residency.place_ahead(a)
    assert world.placed == ["a"]
    world.residency.take_changed()
    assert world.residency.evict_one()
    assert not world.residency.table.at[Stage.ARRIVING]
    assert world.residency.table.tier(a) is Tier.HOST
    assert set(world.residency.take_changed()) == {a.digest}
    world.residency.table.check_integrity()
