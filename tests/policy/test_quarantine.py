"""Which adapters are refused after replicas have died, and for how long."""

from __future__ import annotations

import pytest

from loray.errors import AdapterQuarantined
from loray.policy.quarantine import FIRST_S, LONGEST_S, Quarantine, Suspicion
from tests.fixtures.calls import refused

BAD, GOOD = "b" * 64, "a" * 64


def kill(q: Quarantine, digest: str, replica: str, now: float, *also: str) -> None:
    """A request for `digest`, and one for each of `also`, on a replica that dies; all of them fail."""
    requests = {f"{replica}-{i}": d for i, d in enumerate((digest, *also))}
    for request, d in requests.items():
        q.enter(request, d, now)
    for request in requests:
        death = q.died(request, replica, lambda r: replica if r in requests else None, lambda d: False)
        if death is not None:
            q.count(death, now)
        q.leave(request)


def is_refused(q: Quarantine, digest: str, now: float) -> bool:
    try:
        q.enter("probe", digest, now)
    except AdapterQuarantined:
        return True
    q.leave("probe")
    return False


def test_one_that_was_alone_is_refused_at_once() -> None:
    q = Quarantine()
    kill(q, BAD, "r1", 0.0, BAD, BAD)
    with pytest.raises(AdapterQuarantined, match="refused for 60 s: a replica died") as e:
        q.enter("next", BAD, 0.0)
    assert e.value.retry_after_s == FIRST_S
    assert not is_refused(q, GOOD, 0.0)


def test_it_is_tried_with_one_request_and_refused_for_longer() -> None:
    q, now = Quarantine(), 0.0
    for strike in range(9):
        kill(q, BAD, f"r{strike}", now)
        longer = min(LONGEST_S, FIRST_S * 2**strike)
        assert is_refused(q, BAD, now + longer - 1)
        assert not q.is_due(BAD, now + longer - 1)
        now += longer
        assert q.is_due(BAD, now)
    q.enter("trial", BAD, now)
    refused(AdapterQuarantined, "being tried again", q.enter, "another", BAD, now)
    assert q.answered(BAD)
    q.leave("trial")
    assert not q.suspects
    kill(q, BAD, "r99", now)  # for instance its node is lost: it has answered before
    assert not is_refused(q, BAD, now)


def test_of_several_the_one_that_kills_again_is_refused() -> None:
    q = Quarantine()
    kill(q, GOOD, "r1", 0.0, BAD)
    assert not is_refused(q, BAD, 0.0)
    assert not is_refused(q, GOOD, 0.0)
    q.enter("r2", GOOD, 1.0)
    q.answered(GOOD)
    q.leave("r2")
    kill(q, BAD, "r3", 2.0)
    assert is_refused(q, BAD, 2.0)
    assert not is_refused(q, GOOD, 2.0)


def test_one_that_another_replica_has_is_refused_from_its_second_death_on() -> None:
    """The gateway that has seen its tokens was replaced."""
    q = Quarantine()
    for n, is_held in enumerate([True, False]):
        q.enter(f"request {n}", GOOD, 0.0)
        death = q.died(f"request {n}", f"r{n}", lambda r: None, lambda digest, held=is_held: held)
        assert death == (GOOD, f"r{n}", not is_held)
        q.count(death, 0.0)
        q.leave(f"request {n}")
        assert is_refused(q, GOOD, 0.0) is (n == 1)


def test_many_loads_on_a_lost_node_quarantine_none() -> None:
    q, loading = Quarantine(), [f"{i:064x}" for i in range(50)]
    kill(q, loading[0], "r1", 0.0, *loading[1:], *loading)
    assert all(known.until is None for known in q.suspects.values())
    assert not any(is_refused(q, digest, 0.0) for digest in loading)


def test_what_others_know_replaces_what_is_known_here() -> None:
    q = Quarantine()
    kill(q, BAD, "r1", 0.0)
    assert q.learn({}) == []  # released
    assert not is_refused(q, BAD, 0.0)
    assert q.learn({BAD: Suspicion(1, 60.0)}) == []
    assert is_refused(q, BAD, 0.0)


def test_an_adapter_that_has_answered_here_is_innocent_of_one_death_elsewhere() -> None:
    q = Quarantine()
    q.answered(GOOD)
    assert q.learn({GOOD: Suspicion(1, 60.0)}) == [GOOD]
    assert q.is_good(GOOD)
    assert not is_refused(q, GOOD, 0.0)
    assert q.learn({GOOD: Suspicion(2, 60.0)}) == []
    assert not q.is_good(GOOD)
    assert is_refused(q, GOOD, 0.0)
