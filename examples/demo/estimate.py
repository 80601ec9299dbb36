"""How long the demo takes on this machine, by the plans of its recipes."""

from __future__ import annotations

from collections.abc import Sequence
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
    "codepages": Work(22_500, 18_400),
}
_FORWARD = 0.5  # of the time of a trained token: measuring has no backward pass
_START_S = 60.0  # base model, cluster, server and questions
_RUN_S = 45.0  # of a training: its processes, and publishing


class Estimate(NamedTuple):
    """`seconds` None: this machine could not be measured. `dtype`: in which it trains."""

    machine: str
    dtype: str
    tokens_per_s: float | None
    seconds: float | None


def estimated(loray: Commands, work: Path, names: Sequence[str]) -> Estimate:
    """Estimate the demo with the trainings of `names`, which are left. This machine is measured if it has not been."""
    seconds, rate, dtype = _START_S, None, "nothing new"
    for name in names:
        plan = loray.ask("plan", str(work / "recipes" / f"{name}.yaml"))
        if plan is None:
            return Estimate(hardware().describe(), dtype, None, None)
        dtype, rate = plan["run"]["dtype"], plan["time"]["tokens_per_s"]
        seconds += _RUN_S + (WORK[name].trained + _FORWARD * WORK[name].measured) / rate
    return Estimate(hardware().describe(), dtype, rate, seconds)
