"""Requests that are written down, and one replica that serves them."""

from __future__ import annotations

import numpy as np

from loray.simulation.profile import SMOLLM2_TWO_CORES as PROFILE
from loray.simulation.routers import RandomRouter
from loray.simulation.scalers import Fixed
from loray.simulation.simulator import Outcome, Policy, Simulator
from loray.simulation.workload import RequestTrace


def requests(*rows: tuple[float, int, int, int]) -> RequestTrace:
    """(at, prompt, output, adapter)"""
    at, *others = zip(*rows, strict=True)
    return RequestTrace(np.array(at, float), *(np.array(column, np.int64) for column in others))


def run_one(made: RequestTrace, **profile: object) -> Outcome:
    policy = Policy("one", RandomRouter(2, 0), Fixed(1))
    return Simulator(made, PROFILE.model_copy(update=profile), policy, initial=1, size=1).run()
