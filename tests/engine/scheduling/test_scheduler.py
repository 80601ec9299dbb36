"""The scheduler with a real allocator and adapters, and no model: order, blocks, admission, random requests."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loray.engine.memory.adapter_manager import Tier
from loray.engine.request import Request, RequestState
from loray.engine.scheduling.fairness import MAX_OVERTAKES
from loray.engine.scheduling.scheduler import Admission, Growth, OutputLengths, blocks_wanted
from loray.errors import IntegrityError
from loray.spec import GenerateRequest, SamplingParams
from tests.fixtures.life import Life
from tests.fixtures.scheduling import BLOCK_TOKENS, Simulation, adapter


def test_one_tenant_is_served_in_order_of_priority_and_arrival() -> None:
    sim = Simulation(max_num_seqs=1)
    priorities = [0, 2, -1, 0, 2, -1]
    requests = [sim.add(priority=p) for p in priorities]
    sim.run()
    assert sim.started == [requests[i] for i in (2, 5, 0, 3, 1, 4)]


def test_preemption_takes_the_lowest_priority_and_of_these_the_youngest() -> None:
    sim = Simulation(num_blocks=4, enable_prefix_caching=False)
    sim.fill_up()
    requests = [sim.add(n, 14, priority=p) for n, p in ((1, 1), (1, 0), (2, 1), (2, 0))]
    sim.run(until=lambda: sim.scheduler.num_preemptions > 0)
    assert [r.state is RequestState.WAITING for r in requests] == [False, False, True, False]
    sim.run(until=lambda: sim.scheduler.num_preemptions > 1)
    assert [r.state is RequestState.WAITING for r in requests] == [True, False, True, False]
    sim.run()
    assert [len(r.output_ids) for r in requests] == [14] * 4
    assert list(sim.outcomes) == [requests[i] for i in (1, 3, 0, 2)]


def test_who_waits_for_an_adapter_blocks_nobody_and_who_waits_for_blocks_everybody() -> None:
    sim = Simulation(num_blocks=5, loads_at_once=False, enable_prefix_caching=False)
    ref = adapter("cold")
    cold = sim.add(adapter=ref, tenant="t")
    first = sim.add(8, 4, tenant="t")
    sim.step()
    large = sim.add(16, 4, tenant="t")
    small = sim.add(16, 4, tenant="t")
    sim.step()
    assert sim.scheduler.running == [first]  # `large` needs four blocks of the three that are left
    sim.finish(ref.digest)
    sim.run()
    assert sim.started == [first, large, small, cold]  # all of whose adapters, or none, are in the pool


def test_an_adapter_that_fails_fails_all_that_wait_for_it_and_at_once() -> None:
    ref = adapter("x")
    sim = Simulation(loads_at_once=False, max_num_seqs=1)
    busy = sim.add(4, 40)
    waiting = [sim.add(adapter=ref, tenant=t) for t in "ab"]
    sim.step()
    sim.finish(ref.digest, IntegrityError("damaged"))
    sim.step()  # while the batch is full
    assert set(sim.outcomes) == set(waiting)
    assert sim.scheduler.running == [busy]


def test_small_adapters_in_demand_do_not_keep_a_large_one_from_the_host() -> None:
    """Host and pool hold three small adapters or the large one; requests for each small one always wait."""
    sim = Simulation(num_blocks=7, host_bytes=6, max_num_seqs=2, enable_prefix_caching=False)
    small = [adapter(f"small {i}", 2) for i in range(4)]

    def keep_asking() -> None:
        for ref in small:
            while sum(r.adapter is ref for r in sim.scheduler.waiting) < 2:
                sim.add(4, 4, ref, tenant=ref.name)

    for _ in range(50):
        keep_asking()
        sim.step()
    large, num_started = sim.add(4, 4, adapter("large", 5), tenant="large"), len(sim.started)
    while large not in sim.outcomes:
        keep_asking()
        sim.step()
        assert len(sim.started) - num_started <= 40  # five for each that was waiting; it was never before
    assert sim.outcomes[large] is None


@pytest.mark.parametrize("tenants", [("t", "t"), ("hot", "cold")])
def test_resident_adapters_are_preferred_and_cold_ones_wait_for_no_more_than_the_stated_number(
    tenants: tuple[str, str],
) -> None:
    """The pool has room for one adapter beside a request: every change of adapter costs an eviction."""
    sim = Simulation(num_blocks=4, max_num_seqs=1, max_num_batched_tokens=1000)
    hot, cold = adapter("hot", 2), adapter("cold", 2)
    for ref in (cold, hot):
        sim.add(adapter=ref)
        sim.run()
    assert sim.adapter_manager.tier(hot) is Tier.POOL
    sim.started.clear()
    evictions = sim.adapter_manager.counts.num_evictions
    colds = [sim.add(4, 4, cold, tenant=tenants[1]) for _ in range(2)]
    for _ in range(18):
        sim.add(4, 4, hot, tenant=tenants[0])
    sim.run()
    assert colds[0].num_overtaken == MAX_OVERTAKES
    assert [sim.started.index(r) for r in colds] == [MAX_OVERTAKES, MAX_OVERTAKES + 1]  # the second is preferred then
    assert sim.adapter_manager.counts.num_evictions - evictions == 2


# Random lives lose nobody and leak nothing; all end, however long copies to the pool take.


def live(seeds: range, most_copy_steps: int) -> None:
    for seed in seeds:
        life = Life(seed, most_copy_steps=most_copy_steps)
        life.live(40)
        life.end()
        life.check()


@pytest.mark.parametrize(("first", "most_copy_steps"), [(0, 0), *((first, 8) for first in range(0, 200, 50))])
def test_random_lives(first: int, most_copy_steps: int) -> None:
    live(range(first, first + 50), most_copy_steps)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 10_000, 500))
def test_ten_thousand_random_lives(first: int) -> None:
    live(range(first, first + 500), 8)


def test_a_long_life_in_a_small_pool() -> None:
    life = Life(2)
    life.sim.fill_up()
    life.live(2000)
    life.end()
    life.check()
    assert life.sim.scheduler.num_preemptions > 80
    assert life.sim.adapter_manager.counts.num_failed_loads > 80
    assert life.sim.scheduler.num_aborted > 40


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


def test_who_waits_for_an_adapter_that_is_evicted_on_its_way_is_served() -> None:
    sim = Simulation(num_blocks=16, copy_steps=lambda: 3, enable_prefix_caching=False)
    sim.fill_up()
    base = sim.add(4, 24)
    sim.step()
    cold = sim.add(4, 4, adapter("cold", 6))
    while "cold" not in sim.placed:
        sim.step()
    assert sim.adapter_manager.tier(adapter("cold")) is Tier.COPYING
    prompt = sim.add(32, 4)
    sim.run(max_steps=100)
    assert [sim.outcomes[r] for r in (base, cold, prompt)] == [None] * 3
    assert sim.placed == ["cold", "cold"]


def wanted_step_by_step(running: list[Growth]) -> int:
    """The oracle: generate token after token."""
    most = now = sum(g.num_blocks for g in running)
    for step in range(1, int(max(g.remaining for g in running)) + 1):
        held = (
            max(g.num_blocks, -(-(g.num_tokens + step - 1) // BLOCK_TOKENS))
            if g.remaining >= step
            else g.num_shared_blocks
            for g in running
        )
        most = max(most, sum(held))
    return most - now


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60), st.integers(0, 3)), min_size=1, max_size=12))
def test_wanted_blocks_are_those_needed_to_half_a_block_for_each_request(kinds: list[tuple[int, int, int]]) -> None:
    running = [
        Growth(num_tokens, -(-num_tokens // BLOCK_TOKENS), min(shared, num_tokens // BLOCK_TOKENS), remaining)
        for num_tokens, remaining, shared in kinds
    ]
    needed, wanted = wanted_step_by_step(running), blocks_wanted(running, BLOCK_TOKENS)
    assert abs(wanted - needed) <= len(running) / 2


def test_an_output_is_expected_to_be_as_long_as_the_longer_ones_before_it() -> None:
    lengths = OutputLengths()
    assert (lengths.mean, lengths.remaining(0), lengths.remaining(500)) == (0, 128, 500)
    rng = random.Random(0)
    seen = [rng.randint(1, 100) for _ in range(200)]
    for n in seen:
        lengths.observe(n)
    latest = seen[-64:]
    assert lengths.mean == pytest.approx(sum(latest) / 64)
    for generated in range(120):
        longer = [n for n in latest if n > generated]
        expected = sum(longer) / len(longer) - generated if longer else generated
        assert lengths.remaining(generated) == pytest.approx(expected)


def crowd(prompt: int, ends: tuple[int, int], num_blocks: int) -> Simulation:
    """Requests that may generate up to 2,000 tokens, more than the pool holds; all end before."""
    sim = Simulation(
        checks=False,
        num_blocks=num_blocks,
        max_num_seqs=32,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
        step_s=0.013,
        token_s=0.0006,
    )
    rng = random.Random(0)
    for _ in range(200):
        sim.add(prompt, 2000, ends=rng.randint(*ends))
    sim.run()
    assert set(sim.outcomes.values()) == {None}
    return sim


@pytest.mark.parametrize(
    ("prompt", "ends", "num_blocks", "share"),
    [(64, (200, 200), 600, 0.15), (64, (1, 200), 600, 0.15), (100, (1, 400), 1000, 0.15), (500, (5, 50), 2100, 0.3)],
)
def test_admission_that_looks_ahead_ends_the_thrash(
    monkeypatch: pytest.MonkeyPatch, prompt: int, ends: tuple[int, int], num_blocks: int, share: float
) -> None:
    """`share`: of the preemptions that remain. It does not cost time."""
    ahead = crowd(prompt, ends, num_blocks)
    monkeypatch.setattr(Admission, "_lasts", lambda self, request, running: True)
    full = crowd(prompt, ends, num_blocks)
    assert ahead.scheduler.num_preemptions <= share * full.scheduler.num_preemptions
    assert ahead.now <= full.now


def test_without_a_prefix_cache_a_full_block_costs_nothing_for_the_tokens_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []
    tokens = Request.tokens

    def reading(self: Request, start: int, stop: int) -> Sequence[int]:
        read.append(stop - start)
        return tokens(self, start, stop)

    sim = Simulation(enable_prefix_caching=False, max_num_batched_tokens=512)
    sim.add(num_prompt=400, max_tokens=60)
    sim.step()
    monkeypatch.setattr(Request, "tokens", reading)
    sim.run()
    assert max(read, default=0) <= BLOCK_TOKENS
