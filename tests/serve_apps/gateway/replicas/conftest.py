"""Replicas that no router of this process knows yet, and gateways that wait for nothing."""

from __future__ import annotations

import pytest

from loray.policy.routing import RoutingReports
from serve_apps.channel import listener
from serve_apps.gateway.replicas import engines, router
from tests.fixtures.routed import Replica


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_BACKOFF_S", 0.0)
    monkeypatch.setattr(listener, "_LOST_S", 0.01)
    monkeypatch.setattr(router, "own", router.OwnRequests())


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> list[Replica]:
    for name in ("_decisions", "_suspects", "_replicas"):
        monkeypatch.setattr(router, name, {})
    monkeypatch.setattr(router, "reports", RoutingReports())
    return [Replica("one"), Replica("two")]
