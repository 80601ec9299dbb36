"""What a page asks of the simulator: within bounds, and with the policies that there are."""

from __future__ import annotations

import pytest

from loray.errors import SpecError
from loray.simulation.__main__ import told
from loray.simulation.asked import POLICY_NAMES, Asked
from loray.simulation.scenario import POLICIES


def test_policies_are_called_alike() -> None:
    assert tuple(POLICIES) == POLICY_NAMES


def test_each_policy_has_its_line() -> None:
    found = told(Asked(replicas=2, adapters=10, minutes=1, policies=("ray", "loray")))
    assert [line.policy for line in found.lines] == ["ray", "loray"]
    assert all(len(line.p99_s) == len(line.replicas) == len(found.minutes) for line in found.lines)
    assert (round(found.minutes[-1]), found.num_requests > 0, found.lines[0].summary["p99_ttft_s"] > 0) == (
        1,
        True,
        True,
    )


def test_too_much_is_refused() -> None:
    with pytest.raises(SpecError, match="at most 20,000"):
        told(Asked(replicas=64, minutes=60, utilization=1))
    with pytest.raises(SpecError, match="choose policies of loray"):
        told(Asked(policies=("magic",)))
