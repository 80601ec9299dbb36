"""How long the demo takes on this machine, by the plans of its recipes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from commands import Commands

from loray.machine import hardware


class Work(NamedTuple):
    """Tokens that a training trains on in all, and tokens that are measured before and after it."""

    trained: int
    measured: int


WORK = {
    "orders": Work(7_800, 5_800),
    "dates": Work(11_100, 5_600),
    "codepages": Work(28_700, 18_400),
}
_FORWARD = 0.5  # of the time of a trained token: measuring has no backward pass
_START_S = 75.0  # base model, measuring this machine, cluster, server and questions
_RUN_S = 50.0  # of a job: its processes, and publishing


class Estimate(NamedTuple):
    """`seconds` None: this machine could not be measured. `dtype`: in which it trains."""

    machine: str
    dtype: str
    tokens_per_s: float | None
    seconds: float | None


def estimated(loray: Commands, work: Path, jobs: Sequence[Sequence[str]]) -> Estimate:
    """Estimate the demo with the adapters that each job has left. This machine is measured if it has not been."""
    seconds, rate, dtype = _START_S + _RUN_S * sum(map(bool, jobs)), None, "nothing new"
    for name in chain.from_iterable(jobs):
        plan = loray.ask("plan", str(work / "recipes" / f"{name}.yaml"))
        if plan is None:
            return Estimate(hardware().describe(), dtype, None, None)
        dtype, rate = plan["run"]["dtype"], plan["time"]["tokens_per_s"]
        seconds += (WORK[name].trained + _FORWARD * WORK[name].measured) / rate
    return Estimate(hardware().describe(), dtype, rate, seconds)
