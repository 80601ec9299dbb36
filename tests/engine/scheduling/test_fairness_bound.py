"""Backlogged tenants are served within the bound that the counters guarantee."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loray.engine.request import Request, RequestState
from tests.engine.scheduling.simulation import Simulation, adapter


class Bound:
    """Observes counters and service step by step. `lead`: 0 if no request is preferred."""

    def __init__(self, sim: Simulation, tenants: list[str], lead: float) -> None:
        self.sim, self.tenants, self.lead = sim, tenants, lead
        self.max_gap = 0.0
        self.gaps: defaultdict[tuple[str, str], list[int]] = defaultdict(list)

    def watch(self) -> None:
        fair = self.sim.scheduler.waiting.fair
        counters = [fair.counter(t) for t in self.tenants]
        self.max_gap = max(self.max_gap, max(counters) - min(counters))
        for f, g in combinations(self.tenants, 2):
            self.gaps[f, g].append(self.sim.served[f] - self.sim.served[g])

    @property
    def of_counters(self) -> float:
        """`most_prompt` is what may be computed of a tenant's prompts when the next request finds no place."""
        return self.lead + self.sim.most_prompt + 2 * self.sim.most_output

    def check(self) -> None:
        """Every pair of tenants, over every interval."""
        assert self.max_gap <= self.of_counters
        for gaps in self.gaps.values():
            assert max(gaps) - min(gaps) <= 2 * self.of_counters


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_backlogged_tenants_are_served_within_the_bound(data: st.DataObject) -> None:
    """With any requests, preemption, chunked prompts and preferred adapters."""
    draw = data.draw
    sizes = st.tuples(st.integers(1, 12), st.integers(1, 10), st.integers(1, 10))
    tenants = {name: draw(st.lists(sizes, min_size=1, max_size=4)) for name in "abc"[: draw(st.integers(2, 3))]}
    budget = draw(st.integers(4, 24))
    sim = Simulation(
        num_blocks=draw(st.integers(12, 30)),
        max_num_seqs=draw(st.integers(1, 4)),
        max_num_batched_tokens=budget,
        enable_prefix_caching=False,
    )
    refs = [adapter(f"x{i}", 2) for i in range(4)]
    for warm in refs:  # on the host from now on: who waits for the store does not wait for service
        sim.add(adapter=warm, tenant="warm")
    sim.run()
    sim.most_output = sim.most_prompt = 0
    bound = Bound(sim, list(tenants), lead=budget)
    queued: dict[str, int] = dict.fromkeys(tenants, 0)
    for _ in range(150):
        for name, kinds in tenants.items():  # each always has more waiting than could start in one step
            while sum(r.tenant == name for r in sim.scheduler.waiting) < 5:
                num_prompt, max_tokens, ends = kinds[queued[name] % len(kinds)]
                ref = refs[(queued[name] // 2) % 4] if name != "a" else None
                sim.add(num_prompt, max_tokens, ref, tenant=name, ends=min(ends, max_tokens))
                queued[name] += 1
        sim.step()
        bound.watch()
    bound.check()


def test_prompts_of_3_and_of_100000_tokens_share_within_the_bound_of_one_step() -> None:
    """Tenants with long prompts, with short ones and with both wait all the time, beside one of worse priority. While
    there are places, the length of a prompt is not in the bound.
    """
    budget, num_long = 256, 100_000
    sim = Simulation(
        num_blocks=1 << 18,
        max_num_seqs=200,
        max_num_batched_tokens=budget,
        enable_prefix_caching=False,
        step_s=0.005,
        token_s=0.0001,
        pair_s=1e-9,
        itl_slo_s=0.05,
    )
    sim.check_integrity = lambda: None  # type: ignore[method-assign]
    kinds = {"long": [num_long], "short": [3], "mixed": [num_long, *[3] * 40, 500]}
    bound = Bound(sim, list(kinds), lead=0)
    waiting: dict[str, list[Request]] = {name: [] for name in kinds}
    low = sim.add(10, 1, tenant="low", priority=1)
    num_added = 0
    for _ in range(500):
        for name, sizes in kinds.items():
            waiting[name] = [r for r in waiting[name] if r.state is RequestState.WAITING]
            while len(waiting[name]) < (2 if name == "long" else 90):
                waiting[name].append(sim.add(sizes[num_added % len(sizes)], 2, tenant=name))
                num_added += 1
        sim.step()
        assert len(sim.scheduler.running) < 200
        bound.watch()
    sim.most_prompt = budget
    bound.check()
    assert bound.of_counters < 2 * budget + 2 * 200 * 2
    assert min(sim.served[name] for name in kinds) > 30_000
    assert low.state is RequestState.WAITING


def test_a_flood_does_not_drown_another_tenant() -> None:
    """1,000 requests at once, and 100 that come later: each tenant gets half while both wait. First come, first served
    would give the second none.
    """
    sim = Simulation(max_num_seqs=4, max_num_batched_tokens=32)
    sim.check_integrity = lambda: None  # type: ignore[method-assign]
    for _ in range(1000):
        sim.add(8, 16, tenant="flood")
    others = [sim.add(4, 8, tenant="other") for _ in range(100)]
    bound = Bound(sim, ["flood", "other"], lead=0)
    while others[-1] not in sim.started:
        sim.step()
        bound.watch()
    bound.check()
    assert bound.of_counters <= 32 + 2 * 4 * 16
    assert sim.served["other"] > 1900
    assert abs(sim.served["flood"] - sim.served["other"]) <= 2 * bound.of_counters


@pytest.mark.parametrize("num_floods", [1, 3])
def test_who_asks_for_little_waits_for_one_request_of_each_other_tenant(num_floods: int) -> None:
    """A tenant with one request at a time beside floods: each starts after at most one request of every flood. Without
    fairness it would wait for the whole queue.
    """
    sim = Simulation(max_num_seqs=4, max_num_batched_tokens=32, step_s=1.0)
    sim.check_integrity = lambda: None  # type: ignore[method-assign]
    for _ in range(300):
        for flood in range(num_floods):
            sim.add(4, 8, tenant=f"flood-{flood}")
    for _ in range(20):
        asked_at, num_started = sim.now, len(sim.started)
        request = sim.add(4, 2, tenant="little")
        sim.run(until=lambda r=request: r in sim.outcomes)  # type: ignore[misc]
        assert sim.started.index(request) - num_started <= num_floods
        assert sim.first_token_at[request] - asked_at <= 8 * (num_floods + 1)
    assert len(sim.scheduler.waiting) > 100
