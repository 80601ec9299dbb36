"""Which sessions a canary takes, and which counts end it."""

from __future__ import annotations

import pytest

from loray.policy.canary import breach, is_taken, session_of
from loray.spec import CanaryBounds, CanaryCounts, LogMoments, Principal, VersionCounts
from tests.fixtures.figures import counts

SESSIONS = [f"default/session/{i}" for i in range(4000)]


def taken(canary: str, percent: int) -> set[str]:
    return {session for session in SESSIONS if is_taken(canary, session, percent)}


def test_a_share_is_a_share() -> None:
    for percent in (1, 10, 50, 99):
        share = len(taken("tone@prod@4", percent)) / len(SESSIONS)
        assert abs(share - percent / 100) < 4 * (percent / 100 * (1 - percent / 100) / len(SESSIONS)) ** 0.5


def test_a_larger_share_moves_only_what_is_missing_and_another_canary_draws_others() -> None:
    ten = taken("tone@prod@4", 10)
    assert taken("tone@prod@4", 10) == ten < taken("tone@prod@4", 20)
    assert len(ten & taken("tone@prod@5", 10)) < len(ten) / 4


def test_what_a_session_is() -> None:
    nobody, key = Principal(), Principal(key_id="key-5f1b_2", tenant="acme")
    assert session_of(nobody, None, None) is None
    assert session_of(nobody, "", "ann") == "default/user/ann"
    assert session_of(key, "s1", "ann") == "acme/session/s1"
    assert session_of(key, None, "ann") == "acme/user/ann"
    assert session_of(key, None, None) == session_of(Principal(key_id="key-5f1b_3", tenant="acme"), None, None)


@pytest.mark.parametrize(
    ("stable", "canary", "bound"),
    [
        (counts(900), counts(100), None),
        (counts(900), counts(100, errors=5), None),
        (counts(900), counts(100, errors=6), "error_rate"),
        (counts(0), counts(3, errors=3), "error_rate"),  # whatever the next 47 do
        (counts(900), counts(2, errors=2), None),
        (counts(900), counts(100, ttft=0.19), None),
        (counts(900), counts(100, ttft=0.22), "ttft"),
        (counts(900), counts(49, ttft=9.0), None),  # too few
        (counts(49), counts(100, ttft=9.0), None),
        (counts(900), counts(100, itl=0.05), "itl"),
    ],
)
def test_bounds(stable: VersionCounts, canary: VersionCounts, bound: str | None) -> None:
    found = breach(CanaryBounds(), CanaryCounts(stable, canary))
    assert (None if found is None else found.bound) == bound


def test_a_difference_that_chance_explains_ends_nothing() -> None:
    wide = LogMoments()
    for i in range(60):
        wide = wide.plus(0.22 * (8 if i % 2 else 1 / 8))
    assert wide.mean == pytest.approx(0.22)
    found = CanaryCounts(counts(900), VersionCounts(60, 0, wide, LogMoments()))
    assert breach(CanaryBounds(), found) is None


def test_bounds_can_be_off() -> None:
    off = CanaryBounds(max_error_rate=None, max_ttft_ratio=None, max_itl_ratio=None)
    assert breach(off, CanaryCounts(counts(100), counts(100, errors=50, ttft=9.0, itl=9.0))) is None
