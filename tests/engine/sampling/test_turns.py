"""Masks in virtual time: what steps spend on them, and who gets one when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from loray.engine.request import Request
from loray.engine.sampling.turns import MaskTurns
from loray.spec import GenerateRequest, SamplingParams
from loray.text.grammar import MAX_MEAN_MASK_S, MIN_MASKS

BUDGET_S, GROUP_SIZE, SLOW_S = 0.005, 8, 0.015
_Cost = Callable[[int], float]


def always(seconds: float) -> _Cost:
    return lambda number: seconds


class World:
    """Requests that need a mask again as soon as they have one. `seconds`: of a request's mask, by its number."""

    def __init__(self, budget_s: float = BUDGET_S) -> None:
        self.turns = MaskTurns(budget_s, GROUP_SIZE)
        self.cost: dict[Request, _Cost] = {}
        self.num_masks: Counter[Request] = Counter()
        self.last: dict[Request, int] = {}  # the step of its last mask
        self.longest_wait: Counter[Request] = Counter()
        self.spent: list[float] = []  # by each step
        self.sizes: list[int] = []  # of groups

    def add(self, tenant: str, seconds: float | _Cost, number: int = 1) -> list[Request]:
        made: list[Request] = []
        for _ in range(number):
            spec = GenerateRequest(f"{len(self.cost)}", (1,), SamplingParams(), tenant=tenant)
            made.append(request := Request(spec, len(self.cost)))
            self.cost[request] = always(seconds) if isinstance(seconds, float) else seconds
            self.last[request] = len(self.spent)
            self.turns.enter(request)
        return made

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.turns.next_step()
            seconds, spent = list[float](), 0.0
            for group in self.turns.begin():
                if spent >= group.limit_s:
                    break
                self.sizes.append(len(group.requests))
                seconds.append(sum(self.cost[r](self.num_masks[r]) for r in group.requests))
                spent += seconds[-1]
            self.spent.append(spent)
            for request in self.turns.end(seconds):
                self.num_masks[request] += 1
                self.longest_wait[request] = max(self.longest_wait[request], len(self.spent) - self.last[request])
                self.last[request] = len(self.spent)
                self.turns.add(request)


@pytest.mark.parametrize("budget_s", [0.005, 0.002])
def test_slow_masks_take_the_budget_a_step_and_each_request_gets_one_in_turn(budget_s: float) -> None:
    world = World(budget_s)
    rows, num_steps = world.add("a", SLOW_S, 64), 3000
    world.run(num_steps)
    # At first nobody knows that they are slow, and some are computed together.
    settled = world.spent[int(64 * SLOW_S / budget_s) + 1 :]
    assert max(settled) == pytest.approx(SLOW_S)
    assert sum(world.spent) <= num_steps * budget_s + GROUP_SIZE * SLOW_S
    assert sum(world.spent) > 0.95 * num_steps * budget_s
    round_steps = len(rows) * SLOW_S / budget_s + GROUP_SIZE * SLOW_S / budget_s
    assert all(world.longest_wait[r] <= round_steps + 2 for r in rows)
    assert max(world.num_masks.values()) - min(world.num_masks[r] for r in rows) <= 1


def test_quick_masks_are_computed_in_each_step_in_groups() -> None:
    world = World()
    rows = world.add("a", 20e-6, 100) + world.add("b", 20e-6)
    world.run(50)
    assert all(world.num_masks[r] == 50 for r in rows)
    assert world.sizes == [*[8] * 12, 5] * 50


def test_a_tenant_with_quick_masks_does_not_wait_for_those_of_another() -> None:
    world = World()
    world.add("loud", SLOW_S, 63)
    world.run(200)
    (quiet,) = world.add("quiet", 50e-6)
    world.run(1000)
    assert world.num_masks[quiet] > 980
    assert world.longest_wait[quiet] <= 6
    assert sum(world.spent[200:]) <= 1000 * BUDGET_S + 2 * SLOW_S


def test_tenants_have_equal_shares_whatever_they_send() -> None:
    world = World()
    loud, quiet = world.add("loud", SLOW_S, 40), world.add("quiet", SLOW_S, 2)
    slower = world.add("slower", 2 * SLOW_S, 5)
    world.run(500)
    world.num_masks.clear()
    world.run(5000)
    used = [sum(world.cost[r](0) * world.num_masks[r] for r in rows) for rows in (loud, quiet, slower)]
    assert max(used) - min(used) <= 0.1 * min(used)
    assert sum(world.spent[500:]) <= 5000 * BUDGET_S + 6 * SLOW_S


def test_masks_that_are_slow_now_and_then_are_paid_for_by_their_tenant() -> None:
    """All in one step: each of them takes as much time as the limits of a grammar allow."""
    world = World()
    world.add("loud", lambda n: SLOW_S if n % 40 == 39 else 1e-5, 64)
    (quiet,) = world.add("quiet", 1e-5)
    world.run(2000)
    assert sum(world.spent) <= 2000 * BUDGET_S + GROUP_SIZE * SLOW_S
    assert max(world.spent) <= GROUP_SIZE * SLOW_S + BUDGET_S
    assert world.num_masks[quiet] > 1900


def test_a_new_tenant_has_nothing_to_catch_up() -> None:
    world = World()
    world.add("old", SLOW_S, 4)
    world.run(1000)
    new = world.add("new", SLOW_S, 4)
    world.run(60)
    assert sum(world.spent[1000:]) <= 60 * BUDGET_S + 7 * SLOW_S
    assert sum(world.num_masks[r] for r in new) <= 60 * BUDGET_S / SLOW_S / 2 + 7


def test_a_step_that_a_turn_outlasts_brings_its_budget() -> None:
    world = World()
    (request,) = world.add("a", SLOW_S)
    world.turns.next_step()
    assert len(world.turns.begin()) == 1
    for _ in range(3):
        world.turns.next_step()
    assert world.turns.end([SLOW_S]) == [request]
    world.turns.add(request)
    assert world.turns.begin()


def test_who_leaves_in_the_middle_of_a_turn_leaves_nothing() -> None:
    world = World()
    stays, leaves = world.add("a", 1e-5, 2)
    (other,) = world.add("b", 1e-5)
    groups = world.turns.begin()
    assert [group.requests for group in groups] == [[stays, other, leaves]]
    world.turns.leave(leaves)
    world.turns.leave(other)
    world.turns.leave(other)
    assert world.turns.end([3e-5]) == [stays, other, leaves]
    assert not world.turns
    assert world.turns._used_s.keys() == {"a"}
    world.turns.leave(stays)
    assert not world.turns._used_s
    assert not world.turns._costs


@pytest.mark.parametrize(("seconds", "expensive"), [(1.2 * MAX_MEAN_MASK_S, True), (0.9 * MAX_MEAN_MASK_S, False)])
def test_a_mean_over_many_masks_is_too_expensive(seconds: float, expensive: bool) -> None:
    world = World()
    (request,) = world.add("a", seconds)
    while world.num_masks[request] < MIN_MASKS - 1:
        world.run(1)
    assert not world.turns.is_too_expensive(request)
    while world.num_masks[request] < MIN_MASKS:
        world.run(1)
    assert world.turns.is_too_expensive(request) == expensive


def test_a_quick_mask_in_the_group_of_a_slow_one_does_not_count_as_slow() -> None:
    world = World()
    quick = world.add("a", 1e-5, 7)
    world.add("b", lambda n: 1.0 if n % 2 else 1e-5)  # a machine that stands still now and then
    world.run(20_000)
    assert all(world.num_masks[r] > MIN_MASKS for r in quick)
    assert not any(world.turns.is_too_expensive(r) for r in quick)
