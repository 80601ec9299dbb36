"""Requests whose adapters are copied to the pool beside the steps of others."""

from __future__ import annotations

import pytest

from loray.engine.request import Request
from loray.spec import GenerateRequest, SamplingParams
from tests.engine.scheduling.simulation import BLOCK_TOKENS, Simulation, adapter


def test_a_copy_to_the_pool_holds_up_nobody_else() -> None:
    """`cold` waits for its rows while others decode and begin; alone it starts at once."""
    sim = Simulation(copy_steps=lambda: 5)
    alone = sim.add(adapter=adapter("first"))
    sim.run(until=lambda: alone in sim.started, max_steps=4)
    busy, cold, base = sim.add(4, 20), sim.add(adapter=adapter("cold")), sim.add(4, 20)
    for _ in range(2):  # the second one has its load
        sim.step()
    assert sim.placed == ["first", "cold"]
    assert sim.started == [alone, busy, base]
    sim.run(until=lambda: cold in sim.started, max_steps=6)
    assert len(busy.output_ids) >= 5
    sim.run()
    assert sim.placed == ["first", "cold"]
    assert set(sim.outcomes.values()) == {None}


@pytest.mark.parametrize("places_ahead", [False, True])
def test_adapters_of_those_that_wait_for_their_turn_come_where_there_is_room(places_ahead: bool) -> None:
    sim = Simulation(num_blocks=8, max_num_seqs=1, copy_steps=lambda: 2, places_ahead=places_ahead)
    busy = sim.add(4, 12)
    sim.step()
    own = [adapter("small", 2), adapter("large", 6), adapter("next", 2)]
    waiting = [sim.add(adapter=ref, tenant=ref.name) for ref in own]
    for _ in range(8):
        sim.step()
    assert sim.scheduler.running == [busy]
    assert sim.placed == (["small", "next"] if places_ahead else [])  # they leave too few blocks for the third
    sim.run()
    assert set(sim.outcomes) == {busy, *waiting}


def test_a_prefix_counts_as_used_when_its_request_starts_and_not_while_it_waits_for_blocks() -> None:
    """Else one that waits for long would make its prefix worth more than any adapter."""
    sim = Simulation(max_num_seqs=8)
    prompt = tuple(range(1, 18))

    def add(name: str, max_tokens: int) -> Request:
        request = Request(GenerateRequest(name, prompt, SamplingParams(max_tokens=max_tokens)), 100)
        sim.scheduler.add(request)
        sim.ends[request] = max_tokens
        return request

    add("a", 1)
    sim.run()
    nodes = sim.scheduler.prefix_cache._nodes.values()
    assert [node.uses for node in nodes] == [1] * 4
    others = [sim.add(8, n) for n in (6, 12, 18, 24)]
    sim.run(until=lambda: all(r in sim.first_token_at for r in others))
    sim.scheduler._admission._lasts = lambda request, running: len(running) < 2  # type: ignore[method-assign]
    blocked = add("b", 60)
    sim.run(until=lambda: blocked in sim.started)
    assert len(sim.outcomes) > 1, "it has waited for others"
    assert {node.uses for node in sim.scheduler.prefix_cache._nodes.values() if node.key in prefix_keys(prompt)} == {2}
    sim.run()
    assert all(sim.outcomes[r] is None for r in (*others, blocked))


def prefix_keys(prompt: tuple[int, ...]) -> set[tuple[int, ...]]:
    return {prompt[i : i + BLOCK_TOKENS] for i in range(0, len(prompt), BLOCK_TOKENS)}
