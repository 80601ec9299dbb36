"""Masks in virtual time: what steps spend on them, and who gets one when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.engine.request import Request
from loray.engine.sampling.grammar import Grammars
from loray.engine.sampling.turns import MaskTurns
from loray.errors import RequestError
from loray.spec import Constraint, GenerateRequest, SamplingParams
from loray.text.grammar import MASK_BUDGET_GPU_S, MASK_BUDGET_S, MAX_MEAN_MASK_S, MIN_MASKS
from tests.fixtures.constraints import answers
from tests.fixtures.engines import make_engine, request
from tests.fixtures.slow_masks import EOS, constraint, slow

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
            made.append(row := Request(spec, len(self.cost)))
            self.cost[row] = always(seconds) if isinstance(seconds, float) else seconds
            self.last[row] = len(self.spent)
            self.turns.enter(row)
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
            for row in self.turns.end(seconds):
                self.num_masks[row] += 1
                self.longest_wait[row] = max(self.longest_wait[row], len(self.spent) - self.last[row])
                self.last[row] = len(self.spent)
                self.turns.add(row)


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


# Requests whose masks take long, in virtual time, beside others in an engine.
LENGTH = 12
PLAIN = request("plain", range(5, 12), max_tokens=400)


def held(tenant: str, number: int, seconds: float = SLOW_S, length: int = LENGTH) -> GenerateRequest:
    prompt = range(3 + number, 9 + 2 * number)
    params: dict[str, Any] = {"structured": constraint(seconds, length), "max_tokens": length + 1, "temperature": 1.0}
    return replace(request(f"{tenant}{number}", prompt, seed=number, **params), tenant=tenant)


class Masked:
    """An engine with virtual masks, step by step. `got`: the tokens of each request."""

    def __init__(self, base: BaseModel, requests: Sequence[GenerateRequest] = (), **spec: Any) -> None:
        self.engine = make_engine(base, max_num_seqs=16, **spec)
        self.masks = slow(self.engine)
        self.got: dict[str, list[int]] = {r.request_id: [] for r in requests}
        for r in requests:
            self.engine.add(r)

    def expected(self, requests: Sequence[GenerateRequest]) -> dict[str, list[int]]:
        return {name: ids for name, (ids, _) in answers(self.engine, requests).items()}

    def step(self) -> Counter[str]:
        """The number of tokens that each request got."""
        num = Counter[str]()
        for output in self.engine.step():
            assert output.error is None
            assert output.token_id is not None
            self.got[output.request_id].append(output.token_id)
            num[output.request_id] += 1
        self.engine.check_integrity()
        return num

    def finish(self) -> dict[str, list[int]]:
        while self.engine.has_work:
            self.step()
        return self.got

    @property
    def stepped(self) -> set[str]:
        """The requests in the last step."""
        return {chunk.request.request_id for chunk in self.engine._runner.last_chunks}


def asked(seconds: float) -> list[GenerateRequest]:
    return [*(held("loud", i, seconds) for i in range(5)), held("quiet", 5, seconds), PLAIN]


@pytest.mark.parametrize(("on_gpu", "budget_s"), [(False, MASK_BUDGET_S), (True, MASK_BUDGET_GPU_S)])
def test_the_budget_is_that_of_the_device(base: BaseModel, on_gpu: bool, budget_s: float) -> None:
    grammars = Grammars(base, lambda: None, on_gpu=on_gpu)
    assert grammars._turns.budget_s == budget_s
    grammars.close()


def test_a_plain_request_has_a_token_in_each_step_and_the_others_in_turn(base: BaseModel) -> None:
    expected = Masked(base).expected(asked(0.0))
    ours = Masked(base, asked(SLOW_S))
    last, longest, spent = Counter[str](), Counter[str](), list[float]()
    while ours.engine.has_work:
        before, goes_on = ours.masks.seconds, 0 < len(ours.got["plain"]) < PLAIN.params.max_tokens
        num = ours.step()
        spent.append(ours.masks.seconds - before)
        assert num["plain"] == goes_on or not ours.got["plain"][1:]
        for name in num:
            longest[name] = max(longest[name], len(spent) - last[name])
            last[name] = len(spent)
    assert ours.got == expected
    assert all(ids[-1] == EOS for name, ids in expected.items() if name != "plain")
    together = 6 * SLOW_S  # the first ones, of which nobody knows yet that they are slow
    assert spent[0] <= together + SLOW_S + 1e-9
    assert max(spent[1:]) == pytest.approx(SLOW_S)
    assert sum(spent) <= len(spent) * MASK_BUDGET_S + together + 3 * SLOW_S
    num_steps, first = SLOW_S / MASK_BUDGET_S, together / MASK_BUDGET_S
    assert longest["quiet5"] <= first + 2 * num_steps + 2
    assert all(longest[f"loud{i}"] <= first + 2 * 5 * num_steps + 2 for i in range(5))


def test_a_grammar_that_is_too_expensive_ends_its_request_alone(base: BaseModel) -> None:
    others = [held("loud", 1, 1e-5), PLAIN]
    expected = answers(Masked(base).engine, others)
    engine = Masked(base, enable_prefix_caching=False).engine
    free = engine.pool.allocator.num_free
    out = answers(engine, [held("loud", 0, length=100), *others])
    ids, error = out.pop("loud0")
    assert error.startswith("GrammarTooExpensive")
    assert "ms a token" in error
    assert len(ids) == MIN_MASKS - 1
    assert out == expected
    assert engine.pool.allocator.num_free == free
    assert not engine._grammars._answers
    assert not engine._grammars.has_due


def test_slow_masks_alone_are_computed_one_after_another(base: BaseModel) -> None:
    """Steps without requests pay for them; the engine does not fall asleep."""
    ours = Masked(base, [held("a", 0)])
    for _ in range(100):
        ours.step()
        assert not ours.engine.idle or not ours.engine.has_work
    assert len(ours.got["a0"]) == LENGTH + 1
    assert ours.masks.seconds == pytest.approx((LENGTH + 1) * SLOW_S)


def with_a_mask_held(base: BaseModel) -> tuple[Masked, dict[str, list[int]]]:
    """An engine with "a0", whose sixth mask is held, and a plain request; and what they will get."""
    requests = [held("a", 0, 1e-5), replace(PLAIN, params=PLAIN.params.model_copy(update={"max_tokens": 60}))]
    ours = Masked(base, requests)
    while len(ours.got["a0"]) < 5:
        ours.masks.is_held = len(ours.got["a0"]) == 4
        ours.step()
    return ours, Masked(base).expected(requests)


def test_a_mask_that_is_not_there_in_time_is_not_waited_for(base: BaseModel) -> None:
    ours, expected = with_a_mask_held(base)
    for _ in range(6):
        assert ours.step() == {"plain": 1}
        assert ours.stepped == {"plain"}
    ours.masks.go_on()
    ours.step()
    assert ours.stepped == {"a0", "plain"}
    assert ours.finish() == expected


def test_a_request_that_is_preempted_without_its_mask_comes_back_with_it(base: BaseModel) -> None:
    ours, expected = with_a_mask_held(base)
    ours.engine.scheduler.preempt(ours.engine._requests["a0"])
    for _ in range(3):
        ours.step()
        assert ours.stepped == {"plain"}
    ours.masks.go_on()
    assert ours.finish() == expected
    assert ours.engine.stats().num_preemptions == 1


def test_a_request_that_is_cancelled_in_the_thread_leaves_nothing(base: BaseModel) -> None:
    ours, expected = with_a_mask_held(base)
    ours.engine.cancel("a0")
    ours.step()
    ours.masks.go_on()
    assert ours.finish() == expected | {"a0": expected["a0"][:5]}
    assert not ours.engine._grammars._turns._costs


def test_an_error_that_is_found_at_the_end_of_a_step_is_told_by_the_next(base: BaseModel) -> None:
    engine = Masked(base).engine

    def refuse(constraint: Constraint) -> None:
        raise RequestError("no")

    engine._grammars._compilations._compile = refuse  # type: ignore[assignment]
    engine.step()
    engine.add(held("a", 0))
    engine._grammars.end_step()
    assert engine._grammars.has_due
    (output,) = engine.step()
    assert isinstance(output.error, RequestError)
    assert not engine.has_work
