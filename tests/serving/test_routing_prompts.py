"""Requests wait for the prompts before them: replicas with longer ones than others are skipped."""

from __future__ import annotations

from dataclasses import replace

from loray.policy.routing import Candidate, ReplicaView, Routing, RoutingPolicy

ADAPTER = "0" * 16
HELD = frozenset({ADAPTER})


def best(*among: ReplicaView, policy: RoutingPolicy | None = None) -> Candidate:
    return Routing(policy).rank(among, ADAPTER, now=0.0)[0]


def test_a_holder_with_a_long_prompt_before_it_is_skipped_for_a_load() -> None:
    holder, other = ReplicaView("holder", 1, 100, in_pool=HELD), ReplicaView("other", 1, 100)
    assert best(replace(holder, unanswered=1024), other) == ("holder", "pool")
    assert best(replace(holder, unanswered=1025), other) == ("other", "overflow")
    assert best(replace(holder, unanswered=1025), replace(other, unanswered=1)) == ("holder", "pool")


def test_of_several_that_hold_it_none_waits_for_a_long_prompt() -> None:
    among = [ReplicaView(f"r{i}", 1, 100, in_pool=HELD, unanswered=8000 * (i != 3)) for i in range(5)]
    assert best(*among) == ("r3", "pool")


def test_the_bound_on_requests_holds_however_short_their_prompts_are() -> None:
    """The comparison is with replicas that may have another request."""
    full, other = ReplicaView("full", 6, 100, unanswered=0), ReplicaView("other", 2, 100, unanswered=8000)
    assert best(full, other).replica == "other"
    assert best(replace(full, in_pool=HELD), other) == ("other", "overflow")


def test_every_replica_is_offered_once() -> None:
    among = [ReplicaView(f"r{i}", i % 3, 100, unanswered=5000 * i) for i in range(9)]
    ranked = Routing().rank(among, ADAPTER, now=0.0)
    assert sorted(c.replica for c in ranked) == sorted(r.id for r in among)
    assert ranked[0].replica == "r0"
