"""A tenant that calls all its requests urgent gets no more than its share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loray.bases.registry import BaseModel
from loray.policy.quotas import allowed_priority
from loray.spec import Limits, Principal
from serve_apps.gateway.answers.headers import PRIORITY
from tests.fixtures.gateway import ScriptedEngines, delta
from tests.fixtures.scheduling import Bound, Simulation
from tests.serve_apps.attacks.front import front

MOST_URGENT = -(2**31)


def test_a_tenant_that_asks_for_the_most_urgent_priority_keeps_the_others_share(
    tiny_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    engines = ScriptedEngines([delta("a", "stop")])
    with front(tiny_base(), tmp_path, ("greedy", "other"), engines) as gateway:
        answer = gateway.post("greedy", "/v1/completions", prompt="a", priority=MOST_URGENT)
        assert (answer.status_code, answer.headers[PRIORITY]) == (200, "0")
        answer = gateway.post("other", "/v1/completions", prompt="a")
        assert PRIORITY not in answer.headers
    asked = {request.tenant: request.priority for request in engines.requests}

    sim = Simulation(max_num_seqs=1, max_num_batched_tokens=16, enable_prefix_caching=False)
    bound = Bound(sim, list(asked), lead=0)
    for _ in range(400):
        for tenant, priority in asked.items():  # each always has more to do
            while sum(request.tenant == tenant for request in sim.scheduler.waiting) < 3:
                sim.add(8, 4, tenant=tenant, priority=priority)
        sim.step()
        bound.watch()
    bound.check()
    assert sim.served["other"] > 0.4 * sum(sim.served.values())


@pytest.mark.parametrize(
    ("key", "tenant", "applied"),
    [(None, None, 0), (-5, None, 0), (None, -5, 0), (-5, -3, -3), (-(2**40), -(2**40), -1000), (7, -5, 7)],
)
def test_key_and_tenant_must_both_allow_an_urgent_priority(key: int | None, tenant: int | None, applied: int) -> None:
    limits, of_tenant = Limits(min_priority=key), Limits(min_priority=tenant)
    who = Principal(scopes=frozenset({"infer"}), key_id="k", limits=limits, tenant_limits=of_tenant)
    assert allowed_priority(who, MOST_URGENT) == applied
    assert allowed_priority(who, 2**31) == 999


def test_an_administrator_may_ask_any_priority() -> None:
    assert allowed_priority(Principal(), MOST_URGENT) == -1000
    assert allowed_priority(Principal(limits=Limits(min_priority=0)), MOST_URGENT) == 0
