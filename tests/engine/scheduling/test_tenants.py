"""How tenants change the time to the first token: see docs/decisions/0013-tenants-and-permissions.md.

`python -m tests.engine.scheduling.test_tenants` prints them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest

from loray.engine.request import Request
from loray.errors import Overloaded
from loray.spec import AdapterRef
from tests.engine.scheduling.simulation import BLOCK_TOKENS, Simulation, adapter

NUM_SEATS, AT_ONCE, NUM_INPUT, NUM_OUTPUT = 32, 48, 64, 32
POOL_ADAPTERS, ADAPTER_BLOCKS = 100, 4
Tenant = Callable[[AdapterRef], str]


def anonymous(ref: AdapterRef) -> str:
    return ""


def each_adapter(ref: AdapterRef) -> str:
    return ref.name


class FirstTokens(NamedTuple):
    """Seconds until the first token: the median, the 99th percentile and the maximum."""

    p50: float
    p99: float
    longest: float

    @classmethod
    def of(cls, seconds: list[float]) -> FirstTokens:
        ordered = sorted(seconds)
        return cls(*(ordered[min(len(ordered) - 1, int(p * len(ordered)))] for p in (0.5, 0.99, 1)))


class Replica:
    """As fast as the CPU kernels: 30 ms for a step and 0.5 ms for a token. `at`: when requests came."""

    def __init__(self, tenant: Tenant) -> None:
        kv_blocks = NUM_SEATS * ((NUM_INPUT + NUM_OUTPUT) // BLOCK_TOKENS + 1)
        self.sim = Simulation(
            num_blocks=kv_blocks + 64 + POOL_ADAPTERS * ADAPTER_BLOCKS,
            max_num_seqs=NUM_SEATS,
            max_num_batched_tokens=2048,
            step_s=0.03,
            token_s=0.0005,
            enable_prefix_caching=False,
        )
        self.at: dict[Request, float] = {}
        self._tenant = tenant
        self._num_ended = 0

    def add(self, ref: AdapterRef, at: float | None = None) -> Request:
        request = self.sim.add(NUM_INPUT, NUM_OUTPUT, ref, tenant=self._tenant(ref))
        self.at[request] = self.sim.now if at is None else at
        return request

    def step(self) -> list[Request]:
        """Those that have ended with it."""
        self.sim.step()
        ended = list(self.sim.outcomes)[self._num_ended :]
        self._num_ended += len(ended)
        return ended

    def first_tokens(self, requests: list[Request]) -> FirstTokens:
        return FirstTokens.of([self.sim.first_token_at[r] - self.at[r] for r in requests])


def closed_loop(tenant: Tenant, *, num_adapters: int, alpha: float, num_requests: int) -> FirstTokens:
    """AT_ONCE requests under way at any time, popularity as in benchmarks.serving.workload."""
    rng, replica = random.Random(0), Replica(tenant)
    refs = [adapter(f"a{i}", ADAPTER_BLOCKS) for i in range(num_adapters)]
    coming = (refs[int(num_adapters * rng.random() ** (1 / alpha))] for _ in range(num_requests))
    for _ in range(AT_ONCE):
        replica.add(next(coming))
    while replica.sim.scheduler.has_work:
        for _ in replica.step():
            ref = next(coming, None)
            if ref is not None:
                replica.add(ref)
    return replica.first_tokens(list(replica.at))


def flood(tenant: Tenant, *, num_hot: int, rate: float, num_requests: int) -> FirstTokens:
    """2 · NUM_SEATS requests for a few hot adapters are under way at any time; first tokens of the others' requests,
    `rate` a second for 1,000 adapters.
    """
    rng, replica, due = random.Random(0), Replica(tenant), 0.0
    hot = [adapter(f"hot {i}", ADAPTER_BLOCKS) for i in range(num_hot)]
    loud = {replica.add(hot[i % num_hot]) for i in range(2 * NUM_SEATS)}
    others: list[Request] = []
    while len(others) < num_requests or any(r not in replica.sim.first_token_at for r in others):
        while due <= replica.sim.now and len(others) < num_requests:
            others.append(replica.add(adapter(f"a{rng.randrange(1000)}", ADAPTER_BLOCKS), due))
            due += rng.expovariate(rate)
        for ended in replica.step():
            if ended in loud and ended.adapter is not None:
                loud.add(replica.add(ended.adapter))
    return replica.first_tokens(others)


@pytest.mark.parametrize(("num_adapters", "alpha"), [(100, 1.0), (100, 0.3), (500, 0.3)])
def test_one_anonymous_tenant_leaves_nobody_waiting_whose_adapter_was_served_before(
    num_adapters: int, alpha: float
) -> None:
    one = closed_loop(anonymous, num_adapters=num_adapters, alpha=alpha, num_requests=400)
    each = closed_loop(each_adapter, num_adapters=num_adapters, alpha=alpha, num_requests=400)
    assert one.longest < 1.2 * one.p99
    assert one.p99 < each.p99 / 1.5


def test_named_tenants_are_safe_from_a_flood() -> None:
    case = {"num_hot": 1, "rate": 6.0, "num_requests": 100}
    assert flood(each_adapter, **case).p99 < flood(anonymous, **case).p99 / 1.5


def test_a_flood_of_long_answers_does_not_keep_all_places() -> None:
    sim = Simulation(max_num_seqs=4, num_blocks=1 << 12)
    loud = [sim.add(4, 600, tenant="loud") for _ in range(8)]
    sim.run(until=lambda: len(sim.scheduler.running) == 4)
    others = [sim.add(4, 20, tenant="other") for _ in range(3)]
    sim.run(until=lambda: all(r in sim.first_token_at for r in others[:2]), max_steps=6)
    assert others[2] not in sim.first_token_at, "two places each"
    assert sim.scheduler.num_preemptions == 2
    sim.run(until=lambda: others[2] in sim.outcomes, max_steps=50)
    sim.run()
    assert [len(r.output_ids) for r in (*loud, *others)] == [600] * 8 + [20] * 3
    assert set(sim.outcomes.values()) == {None}


@pytest.mark.parametrize(("tenant", "priority"), [("loud", 0), ("other", 1)])
def test_nobody_gives_place_to_the_own_tenant_nor_for_what_is_less_urgent(tenant: str, priority: int) -> None:
    sim = Simulation(max_num_seqs=2)
    for _ in range(2):
        sim.add(4, 50, tenant="loud")
    sim.step()
    late = sim.add(4, 4, tenant=tenant, priority=priority)
    for _ in range(10):
        sim.step()
    assert late not in sim.first_token_at
    assert not sim.scheduler.num_preemptions


def test_a_flood_fills_the_queue_for_itself_alone() -> None:
    sim = Simulation(max_num_seqs=1, max_queued=4)
    loud = [sim.add(tenant="loud")]
    sim.step()
    loud += [sim.add(tenant="loud") for _ in range(4)]
    with pytest.raises(Overloaded, match="4 requests are waiting already"):
        sim.add(tenant="loud")
    others = [sim.add(tenant="other") for _ in range(2)]
    with pytest.raises(Overloaded):
        sim.add(tenant="other")  # both have two
    sim.remove(loud[4])  # one that has given way leaves
    sim.run()
    assert [r for r in loud if isinstance(sim.outcomes[r], Overloaded)] == [loud[3]]
    assert all(sim.outcomes[r] is None for r in others)


def _print_figures() -> None:
    Simulation.check_integrity = lambda self: None  # type: ignore[method-assign]
    for tenant in (each_adapter, anonymous):
        for num_adapters in (100, 500, 2000):
            for alpha in (1.0, 0.3):
                found = closed_loop(tenant, num_adapters=num_adapters, alpha=alpha, num_requests=4000)
                print(f"{tenant.__name__:12} {num_adapters:5} {alpha} {found}")
        for num_hot in (1, 8):
            for rate in (2.0, 6.0):
                found = flood(tenant, num_hot=num_hot, rate=rate, num_requests=400)
                print(f"{tenant.__name__:12} flood {num_hot} {rate} {found}")


if __name__ == "__main__":
    _print_figures()
