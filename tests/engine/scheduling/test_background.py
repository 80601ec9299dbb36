"""Requests in the background beside others: how much longer steps are, whose turn it is, and that all end."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from loray.engine.request import Request, SchedulerOutput, StepWork
from loray.engine.scheduling.step_budget import MIN_CHUNK
from loray.spec import BACKGROUND_PRIORITY, BATCH_PRIORITY
from tests.fixtures.life import Life
from tests.fixtures.scheduling import Simulation

STEP_S, TOKEN_S = 0.01, 0.0004  # of a step, and more for each row: with a slack of 0.1 two rows join two


def simulation(**options: Any) -> Simulation:
    """Its costs are known."""
    costs = {
        "step_s": STEP_S,
        "token_s": TOKEN_S,
        "max_num_seqs": 32,
        "itl_slo_s": 0.06,
        "num_blocks": 1 << 14,
    } | options
    sim = Simulation(**costs, checks=False)
    steps = sim.scheduler.step_time
    steps.observe(StepWork(1, 1, 1, 512, 1, 1), 1.0)
    steps.costs = StepWork(costs["step_s"], costs["token_s"], 0.0, costs["token_s"])
    sim.scheduler.step_time.observe = lambda work, seconds: None  # type: ignore[method-assign]
    return sim


def ids(plan: SchedulerOutput) -> list[str]:
    return [chunk.request.request_id for chunk in plan.chunks]


def begin(sim: Simulation, num: int, **request: Any) -> list[Request]:
    """They decode."""
    requests = [sim.add(2, 2000, **request) for _ in range(num)]
    sim.run(until=lambda: all(r in sim.first_token_at for r in requests))
    return requests


def test_without_requests_in_the_background_plans_are_what_they_were_before_there_were_any() -> None:
    """Of random lives: the hash is that of a scheduler that knows nothing of them."""
    found = hashlib.sha256()
    for seed in range(40):
        life = Life(seed, most_copy_steps=seed % 2 * 8)
        plan_next = life.sim.scheduler.next

        def noted(plan_next: Any = plan_next) -> SchedulerOutput:
            plan: SchedulerOutput = plan_next()
            chunks = [(c.request.request_id, c.start, c.num_tokens) for c in plan.chunks]
            found.update(repr((chunks, [r.request_id for r, _ in plan.failed], plan.adapters_moved)).encode())
            return plan

        life.sim.scheduler.next = noted  # type: ignore[method-assign]
        life.live(40)
        life.end()
    assert found.hexdigest() == "da326200fa145327887f1be8cb3f6409f6aaa8efd8fc32a71c45e193c23a68e5"


def test_alone_they_run_as_all_others_do() -> None:
    plans = []
    for priority in (0, BATCH_PRIORITY):
        sim = Simulation(step_s=STEP_S, token_s=TOKEN_S, max_num_seqs=8, itl_slo_s=0.06)
        for n in (5, 90, 3, 200):
            sim.add(n, 30, priority=priority)
        plans.append([])
        while sim.scheduler.has_work:
            plans[-1].append(sim.step().work)
    assert plans[0] == plans[1]


@pytest.mark.parametrize("first", range(0, 100, 50))
def test_random_lives_with_and_without_it(first: int) -> None:
    """Nobody is lost, nothing leaks, and all end."""
    for seed in range(first, first + 50):
        life = Life(seed, most_copy_steps=4, priorities=(0, 0, 1, BACKGROUND_PRIORITY, BATCH_PRIORITY))
        life.live(40)
        life.end()
        life.check()


def test_rows_join_as_far_as_the_slack_goes_and_take_turns() -> None:
    sim = simulation()
    others = begin(sim, 20, priority=BACKGROUND_PRIORITY)
    people = begin(sim, 2)
    before = {r: len(r.output_ids) for r in others}
    for _ in range(100):
        names = ids(sim.step())
        assert len(names) == 4
        assert {r.request_id for r in people} < {*names}
    gained = [len(r.output_ids) - before[r] for r in others]
    assert sum(gained) == 200
    assert max(gained) - min(gained) <= 1
    times = sim.token_times[people[0]][-100:]
    assert max(b - a for a, b in pairwise(times)) <= 1.1 * (STEP_S + 2 * TOKEN_S)


def test_one_row_joins_one_of_sixteen_steps_whatever_it_takes() -> None:
    sim = simulation(background_slack=0.0)
    others, (person,) = begin(sim, 3, priority=BACKGROUND_PRIORITY), begin(sim, 1)
    before = Counter({r.request_id: len(r.output_ids) for r in others})
    sizes = [len(ids(sim.step())) for _ in range(96)]
    assert Counter(sizes) == {1: 90, 2: 6}
    assert all(2 in sizes[i : i + 16] for i in range(80))
    assert {len(r.output_ids) - before[r.request_id] for r in others} == {2}
    sim.remove(person)
    assert len(ids(sim.step())) == 3


def test_prompts_wait_for_prompts_of_others_and_hardly_lengthen_steps() -> None:
    sim = simulation()
    (person,) = begin(sim, 1)
    late = sim.add(300, 4, priority=BACKGROUND_PRIORITY)
    chunks = []
    while late not in sim.first_token_at:
        plan = sim.step()
        chunks += [c.num_tokens for c in plan.chunks if c.request is late]
        assert plan.chunks[0].request is person
    assert set(chunks) <= {MIN_CHUNK, 300 % MIN_CHUNK}
    gaps = [b - a for a, b in pairwise(sim.token_times[person])]
    long = sum(gap > 1.1 * (STEP_S + TOKEN_S) + 1e-9 for gap in gaps)
    assert long <= 1 + len(gaps) / 32
    sim.remove(late)
    sim.add(300, 4, priority=BACKGROUND_PRIORITY)
    sim.step()
    urgent = sim.add(40, 4)
    assert ids(sim.step())[:2] == [person.request_id, urgent.request_id]
    assert urgent in sim.first_token_at


def test_prompts_in_the_background_make_no_burst() -> None:
    sim = simulation()
    (person,) = begin(sim, 1)
    for _ in range(12):
        sim.add(400, 4, priority=BACKGROUND_PRIORITY)
    long = sim.add(400, 4)
    while long not in sim.first_token_at:
        sim.step()
    gaps = [b - a for a, b in pairwise(sim.token_times[person])]
    assert max(gaps) < 0.07, "a burst may take 0.24"


def test_who_lacks_blocks_or_a_place_gets_those_of_the_background() -> None:
    sim = simulation(num_blocks=16, enable_prefix_caching=False, max_num_seqs=4)
    sim.fill_up()
    others = [sim.add(10, 6, priority=BACKGROUND_PRIORITY) for _ in range(4)]
    sim.run(until=lambda: all(r in sim.first_token_at for r in others))
    large = sim.add(40, 4)
    sim.run(until=lambda: large in sim.first_token_at, max_steps=6)
    assert sim.scheduler.num_preemptions >= 3
    sim.run()
    assert [len(r.output_ids) for r in others] == [6] * 4


def test_a_step_is_not_empty_while_the_foreground_waits() -> None:
    """For a mask, or for blocks that a request of the same priority has."""
    sim = simulation(background_slack=0.0)
    others, (person,) = begin(sim, 3, priority=BACKGROUND_PRIORITY), begin(sim, 1)
    person.awaits_mask = True
    found = Counter(name for _ in range(6) for name in ids(sim.step()))
    assert found == {r.request_id: 2 for r in others}
    person.awaits_mask = False
    assert person.request_id in ids(sim.step())


def test_the_first_token_of_others_is_not_expected_later_for_it() -> None:
    sim = simulation(ttft_slo_s=1.0, max_num_seqs=4)
    begin(sim, 4, priority=BACKGROUND_PRIORITY, ttft_slo_s=1e9)
    others = sim.scheduler.running[:]
    urgent = sim.add(4, 4)  # all places are taken for long
    sim.run(until=lambda: urgent in sim.first_token_at, max_steps=4)
    assert sim.scheduler.num_preemptions == 1
    assert {*others} > {*sim.scheduler.running} - {urgent}
