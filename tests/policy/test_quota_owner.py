"""One limit counted by several gateways: never more than the stated bound, nothing left unused for long."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loray.errors import RateLimited
from loray.policy.quota_owner import QuotaOwner
from loray.policy.quotas import QuotaGate, Reply, Report, Reservation
from loray.spec import Limits, Principal

_PERIOD_S = 0.1


class Deployment:
    """Gateways and their owner. Reports and replies take a while, and may be lost with the owner."""

    def __init__(self, num_gateways: int, **limits: Any) -> None:
        self.gates = [QuotaGate(num_gateways) for _ in range(num_gateways)]
        self.names = [f"g{i}" for i in range(num_gateways)]
        self.owner = QuotaOwner(num_gateways)
        self.who = Principal(key_id="k1", limits=Limits(**limits))
        self.now = 0.0
        self.under_way: dict[int, tuple[tuple[Report, ...], Reply | None]] = {}
        self.admitted: list[tuple[float, int]] = []

    def ask(self, gateway: int, tokens: int = 1) -> Reservation | None:
        try:
            reservation = self.gates[gateway].admit(self.who, tokens, self.now)
        except RateLimited:
            return None
        self.admitted.append((self.now, tokens))
        return reservation

    def send(self, gateway: int) -> None:
        """Begins an exchange, which `receive` ends."""
        if gateway not in self.under_way:
            self.under_way[gateway] = self.gates[gateway].reports(self.now), None

    def reach(self, gateway: int) -> None:
        reports, reply = self.under_way.get(gateway, ((), None))
        if gateway in self.under_way and reply is None:
            self.under_way[gateway] = reports, self.owner.exchange(self.names[gateway], reports, self.now)

    def receive(self, gateway: int) -> None:
        if gateway in self.under_way and self.under_way[gateway][1] is not None:
            reply = self.under_way.pop(gateway)[1]
            assert reply is not None
            if self.gates[gateway].apply(reply, self.now):
                self.exchange(gateway)

    def exchange(self, gateway: int) -> None:
        self.send(gateway)
        self.reach(gateway)
        self.receive(gateway)

    def fail(self) -> None:
        """The owner is lost, with what is under way, and another one starts."""
        for gateway, (reports, _) in self.under_way.items():
            self.gates[gateway].not_reported(reports)
        self.under_way.clear()
        self.owner = QuotaOwner(len(self.gates))

    def check(self, limit: float, slack: float, *, refills: bool = True) -> None:
        for i, (begin, _) in enumerate(self.admitted):
            total = 0
            for end, units in self.admitted[i:]:
                total += units
                assert total <= limit * (1 + (end - begin) / 60 * refills) + slack + 1e-3


_STEPS = st.lists(
    st.tuples(st.sampled_from(("ask", "ask", "send", "reach", "receive", "exchange", "wait")), st.integers(0, 2**16)),
    max_size=200,
)


@given(
    st.integers(2, 4),
    st.integers(1, 400),
    st.sampled_from([("rpm_limit", 1), ("tpm_limit", 20), ("max_budget", 20)]),
    _STEPS,
)
@settings(max_examples=200)
def test_requests_and_tokens_stay_within_the_bound_whenever_messages_arrive(
    num_gateways: int, limit: int, kind: tuple[str, int], steps: list[tuple[str, int]]
) -> None:
    name, largest = kind
    limit = 1 + limit % 40 if largest == 1 else max(20, limit)
    all_ = Deployment(num_gateways, **{name: limit})
    for step, number in steps:
        if step == "wait":
            all_.now += number % 1000 / 50
        elif step == "ask":
            all_.ask(number % num_gateways, 1 + number % largest)
        else:
            getattr(all_, step)(number % num_gateways)
    all_.check(limit, num_gateways * largest, refills=name != "max_budget")  # one more for each gateway


@given(st.integers(2, 4), st.integers(1, 12), _STEPS)
def test_requests_at_once_stay_within_the_bound(num_gateways: int, limit: int, steps: list[tuple[str, int]]) -> None:
    all_ = Deployment(num_gateways, max_parallel_requests=limit)
    running: list[Reservation] = []
    for step, number in steps:
        if step == "ask":
            reservation = all_.ask(number % num_gateways)
            running += [] if reservation is None else [reservation]
        elif step == "wait" and running:
            running.pop(number % len(running)).settle(1, all_.now)
        elif step != "wait":
            getattr(all_, step)(number % num_gateways)
        assert len(running) <= limit + num_gateways
    for reservation in running:
        reservation.settle(1, all_.now)
    for _ in range(3):
        for gateway in range(num_gateways):
            all_.exchange(gateway)
    assert sum(all_.ask(gateway) is not None for gateway in range(num_gateways) for _ in range(limit)) >= 1


@pytest.mark.parametrize("num_gateways", [2, 8])
@pytest.mark.parametrize("spread", ["uneven", "one"])
def test_a_limit_is_used_within_five_per_cent(num_gateways: int, spread: str) -> None:
    """Twice as much is asked as the limit allows, for three minutes."""
    limit, draw = 600, random.Random(0)
    all_ = Deployment(num_gateways, rpm_limit=limit)
    weights = {"uneven": range(1, num_gateways + 1), "one": [1] + [0] * (num_gateways - 1)}
    minutes = 3
    for step in range(int(minutes * 60 / _PERIOD_S)):
        all_.now = step * _PERIOD_S
        for gateway in draw.choices(range(num_gateways), weights[spread], k=2):
            all_.ask(gateway)
        for gateway in range(num_gateways):
            all_.exchange(gateway)
    allowed = limit * (1 + minutes)
    assert 0.95 * allowed <= len(all_.admitted) <= allowed + num_gateways


def test_a_request_larger_than_a_share_is_admitted() -> None:
    all_ = Deployment(4, tpm_limit=1000)
    assert all_.ask(0, 900)
    assert all_.ask(0, 1) is None  # what it holds is used up
    for gateway in range(4):
        all_.exchange(gateway)
    assert all_.ask(1, 200) is None  # it has been told
    assert all_.ask(1, 50)


def test_what_is_left_goes_to_the_gateway_that_is_asked_and_the_others_keep_enough_for_one() -> None:
    all_ = Deployment(4, rpm_limit=400)
    assert sum(all_.ask(0) is not None for _ in range(60)) == 60
    for _ in range(3):
        for gateway in range(4):
            all_.exchange(gateway)
    assert sum(all_.ask(0) is not None for _ in range(320)) == 320
    assert all(all_.ask(gateway) is not None for gateway in (1, 2, 3))


def test_parallel_requests_of_a_gateway_that_is_gone_are_free_again() -> None:
    all_ = Deployment(2, max_parallel_requests=4)
    mine = [all_.ask(0), all_.ask(0)]
    all_.exchange(0)
    all_.exchange(1)
    all_.exchange(0)
    mine += [all_.ask(0), all_.ask(0)]
    assert sum(reservation is not None for reservation in mine) >= 3
    for _ in range(3):
        all_.exchange(0)
        all_.exchange(1)
    all_.gates[0], all_.names[0] = QuotaGate(2), "another"  # killed, and started anew
    all_.now += 11
    for _ in range(8):
        all_.now += 0.1
        all_.exchange(0)
        all_.exchange(1)
        all_.ask(1)
    assert len(all_.admitted) - len(mine) in (3, 4, 5)


def test_a_new_owner_learns_what_is_left_from_the_gateways() -> None:
    all_ = Deployment(2, max_budget=100, max_parallel_requests=60)
    for step in range(80):
        all_.ask(step % 2)
        all_.exchange(step % 2)
    all_.fail()
    for _ in range(3):
        for gateway in (0, 1):
            all_.exchange(gateway)
    for step in range(80):
        all_.ask(step % 2)
        all_.exchange(step % 2)
    assert len(all_.admitted) in range(55, 63)


def test_a_new_owner_believes_the_gateway_that_knows_most() -> None:
    all_ = Deployment(2, max_budget=100)
    for gateway in (0, 1):
        all_.ask(gateway)
        all_.exchange(gateway)
    assert all(all_.ask(1) for _ in range(30))
    all_.exchange(1)  # of which the other one is not told
    all_.fail()
    for step in range(400):
        all_.ask(step % 2)
        if step % 10 < 2:
            all_.exchange(step % 2)
    assert 95 <= len(all_.admitted) <= 102


def test_without_its_owner_a_gateway_goes_on_with_its_share() -> None:
    all_ = Deployment(2, rpm_limit=60)
    for second in range(600):
        all_.now = float(second)
        for _ in range(3):
            all_.ask(0)
        all_.send(0)
        all_.fail()
    assert 0.9 * 30 * 11 <= len(all_.admitted) <= 30 * 11 + 1


def test_without_its_owner_a_gateway_goes_on_with_its_requests_at_once() -> None:
    all_ = Deployment(2, max_parallel_requests=10)
    running = []
    for step in range(40):
        all_.now = step * _PERIOD_S
        reservation = all_.ask(0)
        running += [] if reservation is None else [reservation]
        for gateway in (0, 1):
            all_.exchange(gateway)
    assert len(running) == 10
    all_.ask(1)  # so that the owner wants what comes back for another gateway
    for gateway in (0, 1, 0):
        all_.exchange(gateway)
    for reservation in running:
        reservation.settle(1, all_.now)
    for _ in range(3):
        all_.send(0)
        all_.fail()
    assert all_.ask(0) is not None


@given(st.data())
def test_an_owner_that_is_lost_at_any_time_costs_at_most_the_limit_once_more(data: st.DataObject) -> None:
    limit, num_gateways = 30, 3
    all_ = Deployment(num_gateways, rpm_limit=limit)
    steps = data.draw(st.lists(st.sampled_from(["ask", "exchange", "send", "reach"]), max_size=150))
    lost = data.draw(st.integers(0, len(steps)))
    for i, step in enumerate(steps):
        if i == lost:
            all_.fail()
        getattr(all_, step)(data.draw(st.integers(0, num_gateways - 1)))
    all_.check(2 * limit, num_gateways)


def test_unused_rules_are_forgotten() -> None:
    owner, gate = QuotaOwner(2), QuotaGate(2)
    for i in range(2500):
        who = Principal(key_id=f"k{i}", limits=Limits(rpm_limit=60))
        gate.admit(who, 1, float(i))
        gate.apply(owner.exchange("g", gate.reports(float(i)), float(i)), float(i))
        owner.counted(float(i))
    assert len(owner._meters) < 100
    assert len(gate._leases) < 2100


def test_a_gateway_that_was_lost_before_the_clock_went_back_holds_nothing_for_longer() -> None:
    deployment = Deployment(2, max_parallel_requests=2)
    deployment.now = 4000.0
    for gateway in (0, 1, 0, 1):
        deployment.ask(gateway)
        deployment.exchange(gateway)
    deployment.now -= 3600
    deployment.exchange(0)
    deployment.now += 11
    deployment.exchange(0)
    assert deployment.names[1] not in deployment.owner._heard
