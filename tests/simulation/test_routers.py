"""The simulated router makes the choices of `policy.routing`, which looks at one replica after the other."""

from __future__ import annotations

import random

import pytest

from loray.policy.routing import ReplicaView, Routing, RoutingPolicy, routing_key
from loray.simulation.cluster import SimulatedRequest
from loray.simulation.profile import SMOLLM2_TWO_CORES as PROFILE
from loray.simulation.routers import LeastWork, SimulatedRouter, TwoChoices
from loray.simulation.workload import digest

NUM_SLOTS, NUM_ADAPTERS, LIMIT = 9, 12, 12
LIMITED = PROFILE.model_copy(update={"max_num_seqs": 8, "max_queued": LIMIT - 8})
KEYS = [routing_key(digest(a)) for a in range(NUM_ADAPTERS)]


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_first_of_rank(seed: int) -> None:
    """Replicas join and leave, adapters move between tiers and away, loads change up to the limit."""
    rng = random.Random(seed)
    tokens = rng.choice([0, 50, 1024])
    policy = RoutingPolicy(floor=rng.choice([1, 2, 4]), excess=rng.choice([0, 1, 3]), excess_tokens=tokens)
    router = SimulatedRouter(NUM_SLOTS, NUM_ADAPTERS, LIMITED, policy)
    routing = Routing(policy)
    names: dict[int, str] = {}
    loads: dict[int, int] = {}
    unanswered: dict[int, list[SimulatedRequest]] = {}
    tiers: dict[int, dict[int, int]] = {}  # reported
    said: dict[int, dict[int, int]] = {}  # by slot and conversation, the names that are known
    for step in range(300):
        now = 0.05 * step
        action = rng.random()
        if not names or (action < 0.06 and len(names) < NUM_SLOTS):
            slot = next(s for s in range(NUM_SLOTS) if s not in names)
            names[slot], loads[slot], tiers[slot], unanswered[slot], said[slot] = f"{slot}-{step}", 0, {}, [], {}
            router.added(slot, names[slot])
        elif action < 0.09 and len(names) > 1:
            slot = rng.choice(list(names))
            del names[slot], loads[slot], tiers[slot]
            router.removed(slot)
            routing.retain(list(names.values()))
        elif action < 0.4:
            slot = rng.choice(list(names))
            loads[slot] = rng.choice([0, 0, 1, 2, 3, 5, 8, LIMIT])
            router.load_changed(slot, loads[slot])
            for job in rng.sample(unanswered[slot], rng.randint(0, len(unanswered[slot]))):
                unanswered[slot].remove(job)
                router.answered(slot, job)
        elif action < 0.65:
            slot, adapter, tier = rng.choice(list(names)), rng.randrange(NUM_ADAPTERS), rng.choice([0, 1, 1, 2])
            if tier == 2 and adapter not in tiers[slot]:
                continue  # gone is only what was there
            router.placed(slot, adapter, tier)
            tiers[slot].pop(adapter, None)
            if tier < 2:
                tiers[slot][adapter] = tier
                routing.reported(names[slot], [KEYS[adapter]])
        if names and rng.random() < 0.5:
            slot, talk = rng.choice(list(names)), rng.randrange(4)
            said[slot][talk] = rng.choice([0, 1, 3, 4, 5, 9])
            router.said(slot, talk, 64 * said[slot][talk] + rng.randrange(64))
        if min(loads.values()) == LIMIT and rng.random() < 0.5:
            continue
        views = [
            ReplicaView(
                names[slot],
                loads[slot],
                LIMIT,
                frozenset(KEYS[a] for a, t in tiers[slot].items() if t == 0),
                frozenset(KEYS[a] for a, t in tiers[slot].items() if t == 1),
                unanswered=sum(job.num_prompt - job.num_expected for job in unanswered[slot]),
                prefixes=frozenset(f"{talk}:{i}" for talk, num in said[slot].items() for i in range(num)),
            )
            for slot in names
        ]
        job = SimulatedRequest(step, rng.choice([1, 20, 100, 4000]), 1, rng.randrange(NUM_ADAPTERS))
        job.talk = rng.choice([None, *range(4)])
        if job.talk is not None:
            job.num_prompt = 64 * rng.randint(9, 40) + 1
        prefix = [f"{job.talk}:{i}" for i in range(job.num_prompt // 64)]
        ranked = routing.rank(views, KEYS[job.adapter], now=now, prefix=prefix)[0]
        chosen = router.choose(job, now)
        assert names[chosen] == ranked.replica
        unanswered[chosen].append(job)
        if job.adapter not in tiers[chosen]:  # where none is below its limit, `sent` counts a held adapter again
            routing.sent(ranked, KEYS[job.adapter], now=now)


def test_what_was_sent_and_never_reported_is_forgotten() -> None:
    router = SimulatedRouter(4, NUM_ADAPTERS, LIMITED, RoutingPolicy(recent_s=10.0))
    for slot in range(4):
        router.added(slot, f"r{slot}")

    def chosen(now: float) -> int:
        job = SimulatedRequest(0, 1, 1, 0)
        slot = router.choose(job, now)
        router.answered(slot, job)
        return slot

    home = chosen(0.0)
    router.load_changed(home, LIMIT)
    other = chosen(1.0)
    router.load_changed(home, 0)
    assert other != home
    assert chosen(10.5) == other
    assert chosen(21.0) == home


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
