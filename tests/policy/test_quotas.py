"""Limits of one gateway: what is admitted, reserved, given back, and what its headers say."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loray.errors import RateLimited
from loray.policy.quotas import QuotaGate, Reservation, rules_of, span
from loray.spec import Limits, Principal
from tests.fixtures.calls import refused

DAY = 86400.0


def principal(*, tenant_limits: Limits | None = None, key_id: str = "k1", **limits: Any) -> Principal:
    return Principal(key_id=key_id, limits=Limits(**limits), tenant_limits=tenant_limits or Limits())


def admitted(gate: QuotaGate, who: Principal, now: float, tokens: int = 1) -> Reservation | None:
    try:
        return gate.admit(who, tokens, now)
    except RateLimited:
        return None


def test_without_limits_nothing_is_kept() -> None:
    gate = QuotaGate()
    first, second = (gate.admit(Principal(), 10**9, now) for now in (0.0, 0.0))
    assert first is second
    assert not first.headers
    first.settle(5, 0.0)
    assert rules_of(Principal()) == ()


def test_requests_a_minute() -> None:
    gate, who = QuotaGate(), principal(rpm_limit=3)
    assert all(admitted(gate, who, 0.0) for _ in range(3))
    with pytest.raises(RateLimited, match="3 requests a minute of the key k1; try again in 20s") as told:
        gate.admit(who, 1, 0.0)
    assert told.value.retry_after_s == pytest.approx(20)
    assert told.value.headers == {
        "x-loray-limit": "requests",
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }
    refused(RateLimited, "", gate.enter, who, 19.9)
    gate.enter(who, 20.1)
    reservation = gate.admit(who, 1, 20.1, num_requests=0)
    assert reservation.headers["x-ratelimit-remaining-requests"] == "0"


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_clock_that_jumps_neither_stops_a_limit_nor_its_refilling(jump: float) -> None:
    gate, who = QuotaGate(), principal(rpm_limit=3)
    assert all(admitted(gate, who, 4000.0) for _ in range(3))
    later = 4000.0 + jump
    assert len([n for n in range(4) if admitted(gate, who, later)]) == (0 if jump < 0 else 3)
    assert not admitted(gate, who, later)
    assert admitted(gate, who, later + 20.1)


def test_a_clock_that_goes_back_over_the_beginning_of_a_period_gives_no_second_budget() -> None:
    gate, who = QuotaGate(), principal(max_budget=100, budget_duration="1d")
    assert admitted(gate, who, DAY + 1, tokens=100)
    for now in (DAY - 1, DAY + 2, 2 * DAY - 1):
        assert not admitted(gate, who, now, tokens=1)
    assert admitted(gate, who, 2 * DAY + 1, tokens=100)


def test_tokens_are_reserved_and_settled() -> None:
    gate, who = QuotaGate(), principal(tpm_limit=1000)
    first = gate.admit(who, 900, 0.0)
    assert first.headers["x-ratelimit-remaining-tokens"] == "100"
    assert admitted(gate, who, 0.0, 200) is None
    for _ in range(2):  # counted once
        first.settle(100, 0.0)
    assert gate.admit(who, 900, 0.0).headers["x-ratelimit-remaining-tokens"] == "0"
    refused(RateLimited, "asks for 1001 tokens", gate.admit, who, 1001, 0.0)


def test_what_was_used_beyond_the_reservation_is_paid_back() -> None:
    gate, who = QuotaGate(), principal(tpm_limit=600)
    gate.admit(who, 100, 0.0).settle(1200, 0.0)
    assert admitted(gate, who, 59.0, 1) is None
    assert admitted(gate, who, 60.2, 1)


def test_parallel_requests() -> None:
    gate, who = QuotaGate(), principal(max_parallel_requests=2)
    first, _ = gate.admit(who, 1, 0.0), gate.admit(who, 1, 0.0)
    assert admitted(gate, who, 0.0) is None
    first.settle(0, 0.0)
    assert admitted(gate, who, 0.0)
    assert admitted(gate, who, 0.0) is None


def test_sequences_run_at_once_and_prompts_are_requests() -> None:
    gate, who = QuotaGate(), principal(max_parallel_requests=4, rpm_limit=10)
    with pytest.raises(RateLimited, match=r"5 sequences, which are prompts times n, and the limit is 4 requests at"):
        gate.admit(who, 1, 0.0, num_sequences=5)
    first = gate.admit(who, 1, 0.0, num_requests=2, num_sequences=3)
    refused(RateLimited, "", gate.admit, who, 1, 0.0, num_sequences=2)
    first.settle(1, 0.0)
    assert gate.admit(who, 1, 0.0, num_sequences=4).headers["x-ratelimit-remaining-requests"] == "7"
    with pytest.raises(RateLimited, match="11 prompts and the limit is 10 requests a minute"):
        QuotaGate().admit(who, 1, 0.0, num_requests=11)


def test_a_request_that_has_entered_pays_whether_it_is_admitted() -> None:
    gate, who = QuotaGate(), principal(rpm_limit=2, tpm_limit=100)
    for _ in range(2):
        gate.enter(who, 0.0)
        refused(RateLimited, "tokens a minute", gate.admit, who, 101, 0.0, num_requests=0)
    refused(RateLimited, "requests a minute", gate.enter, who, 0.0)


def test_what_was_tokenised_is_charged_to_tokens_a_minute_alone() -> None:
    gate, who = QuotaGate(), principal(tpm_limit=100, max_budget=100)
    gate.charge(who, 90, 0.0)
    assert gate.admit(who, 10, 0.0).headers["x-ratelimit-remaining-tokens"] == "0"
    assert admitted(gate, who, 60.0, 90)  # of the budget, which lacks ten


def test_a_reservation_is_extended_while_there_is_room() -> None:
    gate, who = QuotaGate(), principal(tpm_limit=1000, max_budget=500)
    first = gate.admit(who, 100, 0.0)
    assert first.extend(300, 0.0)
    assert not first.extend(101, 0.0)
    assert first.extend(100, 0.0)
    assert not first.extend(1, 0.0)
    first.settle(450, 0.0)
    assert admitted(gate, who, 0.0, 51) is None
    assert admitted(gate, who, 0.0, 50)
    assert gate.admit(Principal(), 1, 0.0).extend(10**9, 0.0)  # without limits


def test_a_budget_begins_anew_with_its_period() -> None:
    gate, who = QuotaGate(), principal(max_budget=100, budget_duration="1d")
    late = gate.admit(who, 60, DAY - 10)
    with pytest.raises(RateLimited, match="100 tokens in 1d of the key k1, of which 60 were asked and 40 are") as full:
        gate.admit(who, 60, DAY - 10)
    assert full.value.retry_after_s == pytest.approx(10)
    assert full.value.headers == {"x-loray-limit": "budget", "x-should-retry": "false"}
    assert admitted(gate, who, DAY, 100)
    late.settle(0, DAY)  # of yesterday
    assert admitted(gate, who, DAY, 1) is None


def test_key_and_tenant_both_apply_and_a_refusal_takes_nothing() -> None:
    gate, tenant = QuotaGate(), Limits(rpm_limit=3)
    mine, theirs = (principal(rpm_limit=2, tenant_limits=tenant, key_id=key) for key in ("a", "b"))
    assert admitted(gate, mine, 0.0)
    assert admitted(gate, mine, 0.0)
    assert admitted(gate, mine, 0.0) is None
    assert admitted(gate, theirs, 0.0)
    refused(RateLimited, "3 requests a minute of the tenant default", gate.admit, theirs, 1, 0.0)
    assert admitted(gate, principal(rpm_limit=2, key_id="b"), 0.0)  # the refusals took nothing of the key's


def test_a_limit_of_nothing_and_a_changed_limit() -> None:
    gate = QuotaGate()
    refused(RateLimited, "0 requests a minute", gate.admit, principal(rpm_limit=0), 1, 0.0)
    assert admitted(gate, principal(rpm_limit=1), 0.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0121, "13ms"), (1.5, "1.5s"), (59.9999, "60s"), (60, "1m0s"), (93_781, "26h3m1s")],
)
def test_spans_as_openai_writes_them(seconds: float, text: str) -> None:
    assert span(seconds) == text


@given(
    st.integers(1, 50),
    st.integers(20, 500),
    st.lists(st.tuples(st.floats(0, 40), st.integers(1, 60), st.floats(0, 1)), min_size=1, max_size=120),
)
def test_no_window_admits_more_than_its_bucket(rpm: int, tpm: int, asked: list[tuple[float, int, float]]) -> None:
    """Of any window: the bucket, and what comes back in it. What is given back may be used again."""
    gate, who = QuotaGate(), principal(rpm_limit=rpm, tpm_limit=tpm)
    now, events = 0.0, []
    for wait, tokens, used in asked:
        now += wait
        reservation = admitted(gate, who, now, tokens)
        if reservation is not None:
            reservation.settle(int(tokens * used), now)
            events.append((now, int(tokens * used)))
    for i, (begin, _) in enumerate(events):
        count = total = 0
        for end, tokens in events[i:]:
            count, total = count + 1, total + tokens
            assert count <= rpm * (1 + (end - begin) / 60) + 1e-3
            assert total <= tpm * (1 + (end - begin) / 60) + 1e-3


def retry_after(gate: QuotaGate, who: Principal, now: float, tokens: int = 1) -> float:
    with pytest.raises(RateLimited) as told:
        gate.admit(who, tokens, now)
    return told.value.retry_after_s


def test_refused_requests_come_again_one_after_another() -> None:
    gate, who = QuotaGate(), principal(rpm_limit=60)
    assert all(admitted(gate, who, 0.0) for _ in range(60))
    told = [retry_after(gate, who, 0.0) for _ in range(60)]
    assert told == pytest.approx(range(1, 61))
    assert retry_after(gate, who, 0.0) == pytest.approx(1.0), "no time is more than a minute ahead"
    for second in range(1, 60):  # each that comes at its time is admitted
        assert admitted(gate, who, second + 1e-3)


def test_turns_that_nobody_takes_are_lost() -> None:
    gate, who = QuotaGate(), principal(rpm_limit=60)
    assert all(admitted(gate, who, 0.0) for _ in range(60))
    assert [retry_after(gate, who, 0.0) for _ in range(20)][-1] == pytest.approx(20.0)
    assert all(admitted(gate, who, 100.0) for _ in range(60))
    assert retry_after(gate, who, 100.0) == pytest.approx(1.0)
    assert retry_after(gate, who, 50.0) < 60.0, "a clock that goes back makes nobody wait for long"


def test_turns_of_tokens_follow_what_requests_take() -> None:
    gate, who = QuotaGate(), principal(tpm_limit=6000)
    assert all(admitted(gate, who, 0.0, 600) for _ in range(10))
    told = [retry_after(gate, who, 0.0, 600) for _ in range(3)]
    assert told == pytest.approx([6.0, 12.0, 18.0])
    with pytest.raises(RateLimited) as told:
        gate.enter(who, 0.0)  # whose tokens are not known yet
    assert told.value.retry_after_s == pytest.approx(24.0)


def test_turns_of_requests_at_once_follow_how_long_they_take() -> None:
    gate, who = QuotaGate(), principal(max_parallel_requests=2)
    first, _ = (gate.admit(who, 1, 0.0) for _ in range(2))
    assert [retry_after(gate, who, 0.0) for _ in range(2)] == pytest.approx([1.0, 1.5])
    first.settle(1, 0.4)
    gate.admit(who, 1, 10.0)
    told = [retry_after(gate, who, 10.0) for _ in range(3)]
    assert told == pytest.approx([1.0, 1.2, 1.4])


def test_turns_of_a_gateway_are_as_far_apart_as_its_share_is_small() -> None:
    gate, who = QuotaGate(num_gateways=3), principal(rpm_limit=60)
    assert all(admitted(gate, who, 0.0) for _ in range(20))
    told = [retry_after(gate, who, 0.0) for _ in range(3)]
    assert [b - a for a, b in pairwise(told)] == pytest.approx([3.0, 3.0])
