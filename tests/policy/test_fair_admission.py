"""Whose requests a gateway works on while it is late."""

from __future__ import annotations

import math

import pytest

from loray.policy.fair_admission import FairAdmission

LATE, ON_TIME, STEP_S = 30.0, 0.0, 0.25


def crowded(num: int = 100, active_s: float = 10.0) -> FairAdmission[int]:
    """A tenant floods, another one has asked, and the gateway has been late until the limit fell to its least value."""
    fair = FairAdmission[int](least=8, active_s=active_s)
    assert all(fair.ask("flood", n, 0.0) for n in range(num))
    assert fair.ask("steady", -1, 0.0)
    fair.ended("steady", 0.0)
    for n in range(200):
        now = n * STEP_S - 49.0
        fair.observe(LATE, now)
        if fair._num > fair.limit:
            fair.ended("flood", now)
    assert fair.limit == 8
    return fair


def test_one_tenant_alone_is_never_held_up() -> None:
    fair = FairAdmission[int]()
    assert all(fair.ask("alone", n, 0.0) for n in range(1000))
    assert not fair.is_crowded, "nobody needs to look how late the loop is"
    fair.observe(LATE, 0.0)
    assert fair.ask("alone", 1001, 0.1)


@pytest.mark.parametrize(
    ("lateness", "limit"),
    [
        ([ON_TIME] * 1000, math.inf),
        ([ON_TIME, LATE] * 10, math.inf),  # one pause changes nothing
        ([LATE] * 50, 50),  # a decrease waits until the last one has come to bear
    ],
)
def test_the_limit_falls_while_the_loop_is_late(lateness: list[float], limit: float) -> None:
    fair = FairAdmission[int]()
    assert all(fair.ask("flood", n, 0.0) for n in range(99))
    assert fair.ask("steady", -1, 0.0)
    for n, late in enumerate(lateness):
        fair.observe(late, n * STEP_S)
    assert fair.limit == limit
    assert limit < math.inf or fair.ask("flood", 99, n * STEP_S)


def test_one_that_floods_waits_for_itself_alone() -> None:
    fair = crowded()
    assert not fair.ask("flood", 1000, 1.0)
    assert all(fair.ask("steady", -n, 1.0) for n in range(1, 5)), "its equal part is 4"
    assert all(fair.ask("steady", -n, 1.0) for n in range(5, 15)), "with 13 it has not 1.25 times the mean of 10.5"
    assert not fair.ask("steady", -15, 1.0)
    assert fair.ended("steady", 1.0) == [1000, -15], "so much of another tenant makes it no flood; fewest are first"


def test_where_all_have_as_many_under_way_nobody_waits() -> None:
    fair = FairAdmission[int]()
    for n in range(200):
        assert all(fair.ask(tenant, n, n * STEP_S) for tenant in "abcd"), "waiting would help nobody"
        fair.observe(LATE, n * STEP_S)
    assert fair.limit < fair._num


def test_who_waits_begins_when_others_end_in_order() -> None:
    fair = crowded()
    assert not any(fair.ask("flood", n, 1.0) for n in (1000, 1001, 1002))
    fair.withdraw("flood", 1001)
    begun = [request for _ in range(10) for request in fair.ended("flood", 1.0)]
    assert begun == [1000, 1002]


def test_the_limit_grows_while_the_loop_is_on_time_and_requests_wait() -> None:
    fair = crowded(active_s=100.0)
    assert not any(fair.ask("flood", n, 1.0) for n in range(1000, 1050))
    begun: list[int] = []
    for n in range(1, 21):
        begun += fair.observe(LATE, 1.0 + n * STEP_S)
        begun += fair.observe(ON_TIME, 1.0 + (n + 0.5) * STEP_S)  # counts in the next step
    assert not begun, "late half of the time, by far more than may be in the mean"
    for n in range(21, 50):
        begun += fair.observe(0.9 * fair._target, 1.0 + n * STEP_S)
    assert 2 <= len(begun) <= 10, "about one a second, once the loop has been on time for a while"
    for n in range(50, 60):
        begun += fair.observe(ON_TIME, 1.0 + n * STEP_S)
    assert begun == list(range(1000, 1050)), "half as many again a step"


def test_a_limit_that_nobody_has_looked_at_for_a_while_is_none() -> None:
    fair = crowded()
    assert not fair.ask("flood", 1000, 1.0)
    assert fair.ask("steady", -1, 5.0)
    assert fair.limit == math.inf
    assert fair.ended("steady", 5.0) == [1000]


def test_a_tenant_that_is_gone_frees_the_other_one() -> None:
    fair = crowded()
    assert not any(fair.ask("flood", n, 1.0) for n in (1000, 1001, 1002))
    assert not any(fair.observe(LATE, 1.0 + n * STEP_S) for n in range(1, 36))
    assert fair.observe(LATE, 10.25) == [1000, 1001, 1002], "nobody else has asked for ten seconds"
    assert all(fair.ask("flood", n, 11.0) for n in range(1003, 1100))
    assert not fair.is_crowded
