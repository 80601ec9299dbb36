"""The index makes the choices of `serving.routing`, which looks at every replica."""

from __future__ import annotations

import random

import numpy as np
import pytest

from loray.policy.routing import ReplicaView, Routing, RoutingPolicy, hashed
from loray.simulation import routers as index_module
from loray.simulation.cluster import SimulatedRequest
from loray.simulation.profile import SMOLLM2_TWO_CORES as PROFILE
from loray.simulation.routers import LeastWork, RoutingIndex, SimulatedRouter, TwoChoices

NUM_SLOTS, NUM_ADAPTERS, LIMIT = 9, 12, 12
KEYS = [f"{a:016x}" for a in range(NUM_ADAPTERS)]


@pytest.mark.parametrize("seed", range(12))
def test_the_first_choice_is_that_of_rank(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas join and leave, adapters move between tiers and away, loads change up to the limit."""
    monkeypatch.setattr(index_module, "_NUM_FIRST", (1, 2, 8)[seed % 3])  # of more, some are looked at first
    monkeypatch.setattr(index_module, "_MANY", (2, 48)[seed % 2])
    monkeypatch.setattr(index_module, "_MOST_CHANGES", (0, 3, 32)[seed % 3])
    rng = random.Random(seed)
    tokens = rng.choice([0, 50, 1024])
    policy = RoutingPolicy(floor=rng.choice([1, 2, 4]), excess=rng.choice([0, 1, 3]), excess_tokens=tokens)
    index = RoutingIndex(NUM_SLOTS, np.array([hashed(k) for k in KEYS], np.uint64), LIMIT, policy)
    routing = Routing(policy)
    names: dict[int, str] = {}
    loads: dict[int, int] = {}
    unanswered: dict[int, int] = {}
    tiers: dict[int, dict[int, int]] = {}  # reported
    for step in range(300):
        now = 0.05 * step
        action = rng.random()
        if not names or (action < 0.06 and len(names) < NUM_SLOTS):
            slot = next(s for s in range(NUM_SLOTS) if s not in names)
            names[slot], loads[slot], tiers[slot], unanswered[slot] = f"{slot}-{step}", 0, {}, 0
            index.add(slot, names[slot])
        elif action < 0.09 and len(names) > 1:
            slot = rng.choice(list(names))
            del names[slot], loads[slot], tiers[slot]
            index.remove(slot)
            routing.retain(list(names.values()))
        elif action < 0.4:
            slot = rng.choice(list(names))
            loads[slot] = rng.choice([0, 0, 1, 2, 3, 5, 8, LIMIT])
            index.set_load(slot, loads[slot])
            prompt = rng.choice([0, 20, 100, 4000, -unanswered[slot]])
            unanswered[slot] += prompt
            index.add_prompt(slot, prompt)
        elif action < 0.65:
            slot, adapter, tier = rng.choice(list(names)), rng.randrange(NUM_ADAPTERS), rng.choice([0, 1, 1, 2])
            if tier == 2 and adapter not in tiers[slot]:
                continue  # gone is only what was there
            index.placed(slot, adapter, tier)
            tiers[slot].pop(adapter, None)
            if tier < 2:
                tiers[slot][adapter] = tier
                routing.reported(names[slot], [KEYS[adapter]])
        views = [
            ReplicaView(
                names[slot],
                loads[slot],
                LIMIT,
                frozenset(KEYS[a] for a, t in tiers[slot].items() if t == 0),
                frozenset(KEYS[a] for a, t in tiers[slot].items() if t == 1),
                unanswered=unanswered[slot],
            )
            for slot in names
        ]
        adapter = rng.randrange(NUM_ADAPTERS)
        ranked = routing.rank(views, KEYS[adapter], now=now)[0]
        chosen = index.best(adapter, now)
        assert names[chosen] == ranked.replica
        # With no replica below its limit, `sent` counts an adapter that the chosen one holds a second time.
        if rng.random() < 0.5 and min(loads.values()) < LIMIT:
            routing.sent(ranked, KEYS[adapter], now=now)
            index.sent(chosen, adapter, now)


def test_what_was_sent_and_never_reported_is_forgotten() -> None:
    index = RoutingIndex(4, np.array([hashed(k) for k in KEYS], np.uint64), LIMIT, RoutingPolicy(recent_s=10.0))
    for slot in range(4):
        index.add(slot, f"r{slot}")
    home = index.best(0, 0.0)
    other = (home + 1) % 4
    index.sent(other, 0, 0.0)
    assert index.best(0, 9.0) == other
    assert index.best(0, 11.0) == home


def test_a_choice_does_not_look_at_all_replicas_again_when_one_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    index = RoutingIndex(64, np.array([hashed(k) for k in KEYS], np.uint64), LIMIT, RoutingPolicy())
    for slot in range(40):
        index.add(slot, f"r{slot}")
    first = index.best(0, 0.0)
    monkeypatch.setattr(index, "_find_first", None)
    monkeypatch.setattr(index, "_most_unanswered", None)
    index.add(40, "r40")
    index.remove(next(slot for slot in range(40) if slot != first))
    assert index.best(0, 0.0) in (first, 40)


def test_routers_by_hand() -> None:
    two, work = TwoChoices(4, 0), LeastWork(4, PROFILE)
    for router in (two, work):
        for slot in (0, 1):
            router.added(slot, f"r{slot}")
    two.load_changed(0, 3)
    assert {two.choose(SimulatedRequest(i, 1, 1, 0), 0.0) for i in range(10)} == {1}
    first = work.choose(SimulatedRequest(0, 2000, 10, 0), 0.0)
    assert [work.choose(SimulatedRequest(i, 100, 10, 0), 0.0) for i in range(1, 5)] == [1 - first] * 4


def test_the_policy_of_the_router_is_that_of_production() -> None:
    """A load of one above the mean sends the next request for a held adapter elsewhere."""
    router = SimulatedRouter(8, 4, PROFILE, RoutingPolicy())
    for slot in range(4):
        router.added(slot, f"r{slot}")
        router.load_changed(slot, 20)
    router.placed(2, 1, 0)
    assert router.choose(SimulatedRequest(0, 1, 1, 1), 0.0) == 2
    router.load_changed(2, 22)
    assert router.choose(SimulatedRequest(0, 1, 1, 1), 0.0) != 2
    router.load_changed(2, 20)
    long = SimulatedRequest(0, 2000, 1, 1)
    assert router.choose(long, 0.0) == 2
    assert router.choose(SimulatedRequest(0, 1, 1, 1), 0.0) != 2
    router.answered(2, long)
    assert router.choose(SimulatedRequest(0, 1, 1, 1), 0.0) == 2
