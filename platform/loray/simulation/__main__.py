"""`python -m loray.simulation`: an `Asked` in JSON on stdin, a `Told` on stdout; exit code 2 where it is refused.

A process of its own, since a simulation computes for seconds in Python.
"""

from __future__ import annotations

import math
import sys

from loray.errors import SpecError
from loray.priority import compute_in_background
from loray.simulation import workload
from loray.simulation.asked import MOST_REQUESTS, Asked, Line, Told
from loray.simulation.profile import SMOLLM2_TWO_CORES
from loray.simulation.scenario import POLICIES, Scenario, simulate
from loray.simulation.simulator import course, summary

_PROFILE = SMOLLM2_TWO_CORES


def told(asked: Asked) -> Told:
    """Raises SpecError for unknown policies and too many requests."""
    if not set(asked.policies) <= set(POLICIES):
        raise SpecError(f"choose policies of {', '.join(POLICIES)}")
    scenario = Scenario(_PROFILE, asked.replicas, asked.adapters, asked.minutes, None, asked.utilization)
    expected = asked.utilization * asked.replicas / _PROFILE.work_seconds(*workload.mean_tokens()) * scenario.seconds
    if expected > MOST_REQUESTS:
        raise SpecError(
            f"these would be about {expected:,.0f} requests, and here at most {MOST_REQUESTS:,} are simulated: ask for "
            "fewer minutes or replicas, or `loray simulate`"
        )
    requests = scenario.requests()
    outcomes = list(simulate(scenario, requests, asked.policies))
    courses = [course(outcome, requests) for outcome in outcomes]
    return Told(
        profile=_PROFILE.name,
        num_requests=len(requests),
        minutes=tuple(round(at / 60, 3) for at in courses[0].at_B.tolist()),
        lines=tuple(
            Line(
                policy=outcome.policy,
                summary=summary(outcome, requests).to_json(),
                p99_s=tuple(round(v, 4) if math.isfinite(v) else None for v in by_time.p99_B.tolist()),
                replicas=tuple(by_time.replicas_B.tolist()),
            )
            for outcome, by_time in zip(outcomes, courses, strict=True)
        ),
    )


def main() -> int:
    compute_in_background()
    try:
        sys.stdout.write(told(Asked.model_validate_json(sys.stdin.read())).model_dump_json())
    except SpecError as e:
        sys.stderr.write(f"{e}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
