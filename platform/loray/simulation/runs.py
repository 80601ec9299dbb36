"""Several policies over several scenarios, each run in a process of its own: a simulation computes in Python."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, MutableSequence, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from typing import NamedTuple

from loray.machine import num_cores
from loray.simulation.scenario import Scenario, simulate
from loray.simulation.simulator import Course, Summary, course, summary

_BETWEEN_S = 0.5


class Run(NamedTuple):
    """One policy over one scenario. `seconds`: what the simulation took."""

    policy: str
    num_requests: int
    summary: Summary
    course: Course
    seconds: float


def run_all(scenarios: Sequence[Scenario], policies: Sequence[str], progress: Callable[[float], None]) -> list[Run]:
    """Run each policy over each scenario, as many at once as there are cores; return them scenario by scenario.
    `progress` is told what share is done.

    Raises SpecError for a scenario without requests.
    """
    todo = [(scenario, policy) for scenario in scenarios for policy in policies]
    context = multiprocessing.get_context("spawn")  # a process that is forked while the progress is drawn may hang
    shares = context.Array("d", len(todo), lock=False)
    pool = ProcessPoolExecutor(min(num_cores(), len(todo)), context, _start, (shares,))
    try:
        left = {pool.submit(_run, index, *one): index for index, one in enumerate(todo)}
        runs: dict[int, Run] = {}
        while left:
            done, _ = wait(left, _BETWEEN_S, FIRST_EXCEPTION)
            runs |= {left.pop(future): future.result() for future in done}
            progress(sum(shares) / len(todo))
        return [runs[index] for index in range(len(todo))]
    finally:
        pool.shutdown(cancel_futures=True)


_shares: MutableSequence[float]  # in a worker: what share of each run is done


def _start(shares: MutableSequence[float]) -> None:
    global _shares
    _shares = shares


def _run(index: int, scenario: Scenario, policy: str) -> Run:
    requests = scenario.requests()
    began = time.perf_counter()
    outcome = simulate(scenario, requests, policy, lambda share: _shares.__setitem__(index, share))
    seconds = time.perf_counter() - began
    _shares[index] = 1.0
    return Run(policy, len(requests), summary(outcome, requests), course(outcome, requests), seconds)
