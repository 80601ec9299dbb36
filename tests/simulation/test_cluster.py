"""Replicas that share processors: what works beside another takes longer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from loray.simulation.cluster import HOST, NOWHERE, POOL, Clock, ReplicaAdapters, Slowdown
from loray.simulation.profile import SMOLLM2_TWO_CORES as PROFILE
from loray.simulation.routers import RandomRouter, TwoChoices
from loray.simulation.simulator import Outcome
from loray.simulation.workload import RequestTrace
from tests.fixtures.simulation import requests, serve

LONG = (400, 20)


def run_two(made: RequestTrace, **profile: Any) -> Outcome:
    """On two replicas, of which the one with fewer requests is chosen."""
    return serve(made, 2, TwoChoices(4, 0), **profile)


def test_work_has_a_time_of_its_own() -> None:
    clock = Clock(0.5)
    clock.joined(1, clock.work(10.0))
    assert clock.seconds(12.0) == 12.0  # nothing is beside it
    clock.joined(1, clock.work(12.0))
    assert clock.seconds(14.0) == 15.0
    assert clock.work(13.5) == 13.0
    clock.joined(1, 14.0)
    assert clock.seconds(16.0) == 19.0
    clock.joined(-2, 16.0)
    assert clock.seconds(17.0) == 20.0


def test_more_than_processors_have_equal_parts_of_them() -> None:
    clock = Clock(0.5, 2)
    clock.joined(2, 0.0)
    assert clock.seconds(1.0) == 1.5
    clock.joined(1, 0.0)
    assert clock.seconds(1.0) == 2.25  # two thirds of a processor for each
    clock.joined(3, 0.0)
    assert clock.seconds(1.0) == 4.5
    assert Slowdown.of(0, 2) == Slowdown.of(1, 2) == (1.0, 0.0)
    assert Slowdown.of(3, math.inf) == (1.0, 2.0)


def test_without_contention_both_times_are_the_same_to_the_last_bit() -> None:
    clock = Clock()
    for i in range(50):
        clock.joined(1, clock.work(0.1 * i))
        assert clock.seconds(clock.work(0.1 * i)) == 0.1 * i


def test_two_replicas_that_work_beside_each_other_take_longer() -> None:
    alone = run_two(requests((0.0, *LONG, 0))).end_R[0]
    made = requests((0.0, *LONG, 0), (0.0, *LONG, 4))  # adapters of one size
    for contention in (0.0, 0.4, 1.0):
        both = run_two(made, contention=contention)
        assert sorted(both.slot_R) == [0, 1]
        assert both.end_R == pytest.approx([(1 + contention) * alone] * 2)


def test_who_comes_later_delays_what_is_left() -> None:
    alone = run_two(requests((0.0, *LONG, 0))).end_R[0]
    first, second = run_two(requests((0.0, *LONG, 0), (0.5 * alone, *LONG, 4)), contention=1.0).end_R
    # Both half as fast until the first has ended, whose half takes as long as it would alone.
    assert first == pytest.approx(1.5 * alone)
    assert second == pytest.approx(1.5 * alone)


def test_one_after_the_other_nothing_takes_longer() -> None:
    made = requests(*((10.0 * i, *LONG, i) for i in range(4)))
    assert np.allclose(run_two(made, contention=1.0).end_R, run_two(made).end_R)
    # Requests of one replica share its steps already.
    made = requests(*((0.01 * i, 50, 20, i) for i in range(8)))
    assert np.allclose(serve(made, contention=1.0).end_R, serve(made).end_R)


def test_requests_on_their_way_are_beside_each_other_and_beside_replicas() -> None:
    apart = requests((0.0, 8, 1, 0), (100.0, 8, 1, 0))
    together = requests((0.0, 8, 1, 0), (0.0, 8, 1, 0))
    profile = {"outside_s": ((1.0, 0.0, 0.0),), "contention": 1.0}
    lone = serve(apart, **profile).ttft_R[1]
    assert serve(together, **profile).ttft_R.min() > lone + 0.99
    replica = serve(requests((0.0, 8, 2000, 0), (5.0, 8, 1, 0)), **profile).ttft_R[1]
    assert replica > 1.99


def test_all_requests_end_and_more_contention_is_slower() -> None:
    rows = [(0.05 * i, 20 + 37 * i % 200, 1 + i % 30, i % 12) for i in range(300)]
    means = []
    for contention in (0.0, 0.2, 0.5):
        outcome = run_two(requests(*rows), contention=contention, outside_s=((0.01, 0.0, 0.0), (0.01, 0.01, 0.0)))
        assert (outcome.end_R >= outcome.ttft_R - 1e-9).all()
        means.append(outcome.ttft_R.mean())
    assert means == sorted(means)
    assert means[0] < means[-1]


def test_a_long_prompt_has_a_step_for_each_of_the_most_tokens() -> None:
    """Whatever their pairs take: these make the steps longer, and not more."""
    profile = {"max_num_batched_tokens": 64, "itl_slo_s": 10.0, "place_s": 0.0, "place_byte_s": 0.0}
    outcome = serve(requests((0.0, 8, 1, 0), (10.0, 640, 1, 0)), **profile)
    assert outcome.ttft_R[1] == pytest.approx(PROFILE.prompt_seconds(640) + 10 * PROFILE.step_s)


def test_a_request_that_finds_its_adapter_in_the_pool_keeps_the_copy_on_the_host() -> None:
    """The host has room for two. The first is asked for again before the third comes, so the second goes."""
    size = 1_840_000
    profile = PROFILE.model_copy(update={"host_bytes": 2.5 * size, "pool_bytes": 10 * size})
    adapters = ReplicaAdapters(0, profile, [size] * 3, RandomRouter(2, 0))
    for adapter in (0, 1):
        assert adapters.add_waiter(adapter) == (False, True)
        adapters.loaded(adapter)
    adapters.take(0, 0.0)
    adapters.give_back(0, 0.0)
    assert adapters.add_waiter(0) == (True, False)
    adapters.add_waiter(2)
    adapters.loaded(2)
    assert [adapters.tier(adapter) for adapter in range(3)] == [POOL, NOWHERE, HOST]


def test_an_adapter_that_only_the_pool_has_is_worth_its_load() -> None:
    """Both have been used once; the one that the host still has is evicted first, although it was used later."""
    size = 1_840_000
    profile = PROFILE.model_copy(update={"host_bytes": 1.5 * size, "pool_bytes": 2.5 * size})
    adapters = ReplicaAdapters(0, profile, [size] * 3, RandomRouter(2, 0))
    for adapter in (0, 1, 2):
        adapters.add_waiter(adapter)
        adapters.loaded(adapter)
        adapters.take(adapter, 0.0)
        adapters.give_back(adapter, 0.0)
    assert [adapters.tier(adapter) for adapter in range(3)] == [POOL, NOWHERE, POOL]
