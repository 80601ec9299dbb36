"""Routers know who has an adapter, and bring a replica's question for one to the replica that has it."""

from __future__ import annotations

import pytest
from ray.serve._private.common import RequestMetadata
from ray.serve.request_router import PendingRequest

from loray.errors import ReplicaUnavailable
from loray.policy.routing import RoutingReports
from loray.spec import AdapterOf
from serve_apps.gateway.replicas import router as module
from serve_apps.gateway.replicas.router import AdapterRouter, decisions, holders, is_held
from tests.serve_apps.gateway.test_router import DIGESTS, Replica, pending, route, with_router


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> list[Replica]:
    for name in ("_decisions", "_suspects", "_routings", "_replicas"):
        monkeypatch.setattr(module, name, {})
    monkeypatch.setattr(module, "reports", RoutingReports())
    return [Replica("one"), Replica("two")]


def test_who_has_an_adapter_is_known_by_reports_and_by_what_was_sent(pair: list[Replica]) -> None:
    pair[0].report(DIGESTS[0])
    pair[1].report(on_host=(DIGESTS[0], DIGESTS[1]))

    async def scenario(router: AdapterRouter) -> None:
        assert set(holders("engine", DIGESTS[0])) == {"one", "two"}
        assert holders("engine", DIGESTS[1]) == ("two",)
        assert holders("engine", DIGESTS[2]) == ()
        first = await route(router, pending(DIGESTS[2]))
        assert holders("engine", DIGESTS[2]) == (first,)
        held = [is_held("engine", besides, DIGESTS[1]) for besides in ("one", "two")]
        assert held == [True, False]
        assert not is_held("engine", "one", DIGESTS[2]), "sent, and not reported"
        router.update_replicas(pair[1:])
        assert holders("engine", DIGESTS[0]) == ("two",)
        assert holders("other", DIGESTS[0]) == ()

    with_router(pair, scenario)


def test_a_question_for_a_replica_goes_there_or_nowhere(pair: list[Replica]) -> None:
    def question(name: str) -> PendingRequest:
        metadata = RequestMetadata(f"q-{name}", f"q-{name}", call_method="give_adapter")
        return PendingRequest([AdapterOf(DIGESTS[0], name)], {}, metadata)

    async def scenario(router: AdapterRouter) -> None:
        for name in ("two", "one", "two"):
            assert await route(router, question(name)) == name
        with pytest.raises(ReplicaUnavailable, match="three"):
            await route(router, question("three"))
        assert await route(router, question("one")) == "one"
        assert not any(decisions("engine").values())

    with_router(pair, scenario)
