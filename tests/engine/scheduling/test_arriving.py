"""Adapters whose rows are on their way to the pool for several steps: nobody waits for one for ever."""

from __future__ import annotations

import pytest

from loray.engine.memory.adapter_manager import Tier
from tests.engine.scheduling.life import Life
from tests.engine.scheduling.simulation import Simulation, adapter


def test_who_waits_for_an_adapter_that_is_evicted_on_its_way_is_served() -> None:
    sim = Simulation(num_blocks=16, copy_steps=lambda: 3, enable_prefix_caching=False)
    sim.fill_up()
    base = sim.add(4, 24)
    sim.step()
    cold = sim.add(4, 4, adapter("cold", 6))
    while "cold" not in sim.placed:
        sim.step()
    assert sim.adapter_manager.table.tier(adapter("cold")) is Tier.LOADING
    prompt = sim.add(32, 4)
    sim.run(max_steps=100)
    assert [sim.outcomes[r] for r in (base, cold, prompt)] == [None] * 3
    assert sim.placed == ["cold", "cold"]


def live(seeds: range) -> None:
    for seed in seeds:
        life = Life(seed, most_copy_steps=8)
        life.live(40)
        life.end()
        life.check()


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_random_lives_end_however_long_copies_take(first: int) -> None:
    live(range(first, first + 50))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 10_000, 500))
def test_ten_thousand_random_lives_end_however_long_copies_take(first: int) -> None:
    live(range(first, first + 500))
