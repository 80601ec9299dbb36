"""Which sessions a canary takes."""

from __future__ import annotations

from loray.policy.canary import is_taken, session_of
from loray.spec import Principal

SESSIONS = [f"default/session/{i}" for i in range(4000)]


def taken(canary: str, percent: int) -> set[str]:
    return {session for session in SESSIONS if is_taken(canary, session, percent)}


def test_a_share_is_a_share() -> None:
    for percent in (1, 10, 50, 99):
        share = len(taken("tone@prod@4", percent)) / len(SESSIONS)
        assert abs(share - percent / 100) < 4 * (percent / 100 * (1 - percent / 100) / len(SESSIONS)) ** 0.5


def test_a_larger_share_moves_only_what_is_missing() -> None:
    ten, twenty = taken("tone@prod@4", 10), taken("tone@prod@4", 20)
    assert ten < twenty
    assert taken("tone@prod@4", 10) == ten


def test_another_canary_draws_other_sessions() -> None:
    first, second = taken("tone@prod@4", 10), taken("tone@prod@5", 10)
    assert len(first & second) < len(first) / 4


def test_what_a_session_is() -> None:
    nobody, key = Principal(), Principal(key_id="key-5f1b_2", tenant="acme")
    assert session_of(nobody, None, None) is None
    assert session_of(nobody, "", "ann") == "default/user/ann"
    assert session_of(key, "s1", "ann") == "acme/session/s1"
    assert session_of(key, None, "ann") == "acme/user/ann"
    assert session_of(key, None, None) == session_of(Principal(key_id="key-5f1b_3", tenant="acme"), None, None)
