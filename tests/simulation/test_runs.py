"""Runs beside each other: what each alone gives, and what a run without requests says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from loray.errors import SpecError
from loray.simulation.profile import SMOLLM2_TWO_CORES
from loray.simulation.runs import run_all
from loray.simulation.scenario import Scenario, simulate
from loray.simulation.simulator import course, summary

SMALL = Scenario(SMOLLM2_TWO_CORES, replicas=3, adapters=20, minutes=0.5)
POLICIES = ("loray", "ray")


def test_runs_beside_each_other_are_those_of_each_alone() -> None:
    scenarios = [SMALL, replace(SMALL, seed=1)]
    shares: list[float] = []
    found = run_all(scenarios, POLICIES, shares.append)
    assert [run.policy for run in found] == [*POLICIES, *POLICIES]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    for run, scenario in zip(found, [SMALL, SMALL, *[scenarios[1]] * 2], strict=True):
        requests = scenario.requests()
        alone = simulate(scenario, requests, run.policy)
        assert run.num_requests == len(requests)
        assert run.summary == summary(alone, requests)
        np.testing.assert_equal(run.course, course(alone, requests))


@pytest.mark.parametrize("turns", [1, 3])
def test_a_scenario_without_requests_is_refused(turns: int) -> None:
    with pytest.raises(SpecError, match="no requests"):
        run_all([replace(SMALL, minutes=1e-6, turns=turns)], POLICIES, lambda share: None)
