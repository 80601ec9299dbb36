"""Canaries over HTTP on scripted engines: who gets which version, what is counted, and the end by what was counted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.catalog.aliases import EndedCanary, ReportAnswer
from loray.errors import BaseStarting, CatalogError, DeadlineExceeded, EngineError, Overloaded
from loray.policy.canary import Arm
from loray.spec import CanaryBounds, CanaryCounts
from serve_apps.gateway.canaries import CanaryCounters
from serve_apps.gateway.metrics import GatewayMetrics
from tests.fixtures.gateway import HELLO, GatewayClient, ScriptedEngines, delta, register

PROD = {"model": "tone@prod"}


@pytest.fixture
def tone(catalog: Catalog, base: BaseModel) -> Catalog:
    """With versions 1 to 3, of which `prod` has 2, and a quarter of its requests version 3."""
    for _ in range(3):
        register(catalog, "tone", base.fingerprint)
    catalog.aliases.move("tone", "prod", 2)
    catalog.canaries.set("tone", "prod", 3, 25, bounds=CanaryBounds(min_requests=20))
    return catalog


def version_of(client: GatewayClient, session: str | None = None, **fields: Any) -> str:
    headers = {} if session is None else {"X-Session-ID": session}
    response = client.complete(headers, **PROD | fields)
    assert response.status_code == 200, response.text
    return str(response.headers["x-adapter-version"])


def test_sessions_keep_their_version_when_the_share_grows(client_of: Any, tone: Catalog) -> None:
    engines = ScriptedEngines(HELLO)
    sessions = [f"s{i}" for i in range(40)]
    with client_of(engines) as client:
        first = {session: version_of(client, session) for session in sessions}
        assert {session: version_of(client, session, model="tone") for session in sessions} == first  # prod is meant
        assert [r.adapter.label for r in engines.requests[:40] if r.adapter] == list(first.values())
        assert set(first.values()) == {"tone@2", "tone@3"}
        for selector, version in (("1", 1), ("2", 2), ("3", 3)):
            assert {version_of(client, s, model=f"tone@{selector}") for s in sessions[:9]} == {f"tone@{version}"}
        assert {version_of(client, user="ann") for _ in range(9)} == {version_of(client, user="ann")}
        assert len({version_of(client) for _ in range(60)}) == 2  # without a session, each request by itself
        card = client.get("/v1/models/tone@prod").json()
        assert (card["root"], card["weights"]) == ("tone@2", {"prod": {"2": 75, "3": 25}})
        tone.canaries.set("tone", "prod", 3, 60)
        client.get("/v1/models/unknown")  # which looks at the catalog again
        grown = {session: version_of(client, session) for session in sessions}
        assert {s for s in sessions if first[s] == "tone@3"} < {s for s in sessions if grown[s] == "tone@3"}
        assert "x-adapter-version" not in client.complete().headers


def test_a_canary_that_fails_is_ended(
    client_of: Any, tone: Catalog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serve_apps.gateway.canaries.REPORT_S", 0.01)

    class Failing(ScriptedEngines):
        async def generate(self, request: Any, *, fit: bool) -> Any:
            if request.adapter.version == 3:
                raise EngineError("the engine has stopped")
            async for item in super().generate(request, fit=fit):
                yield item

    with caplog.at_level(logging.WARNING, logger="loray"), client_of(Failing(HELLO)) as client:
        answers = []
        for i in range(400):  # until the snapshot has the end
            r = client.complete(**PROD, user=f"u{i}")
            answers.append(r.status_code)
            if answers.count(503) >= 2 and tone.canaries.get("tone").outcome is not None:
                break
        client.get("/v1/models/unknown")
        known = tone.canaries.get("tone")
        assert (known.outcome, known.counts.canary.num_errors >= 2) == ("rolled_back", True)
        assert known.reason is not None
        assert {version_of(client, f"s{i}") for i in range(20)} == {"tone@2"}
        metrics = client.get("/metrics").text
    assert 'loray_canary_rollbacks_total{bound="error_rate",gateway="local"} 1.0' in metrics
    assert 'loray_canary_rollbacks_total{bound="ttft",gateway="local"} 0.0' in metrics  # so that an increase is seen
    assert 'loray_canary_requests_total{gateway="local",outcome="error",version="canary"}' in metrics
    assert [r.message for r in caplog.records if "no canary of" in r.message] == [
        f"tone@3 is no canary of tone@prod any more: {known.reason}"
    ]


def test_what_is_counted(client_of: Any, tone: Catalog) -> None:
    tone.canaries.set("tone", "prod", 3, 25, bounds=CanaryBounds(max_error_rate=None))

    def ask(*script: Any, cold: bool = False, **headers: str) -> None:
        engines = ScriptedEngines(script)
        engines.cold = cold
        with client_of(engines) as client:  # which reports when it stops
            for i in range(4):
                client.complete({"X-Session-ID": f"s{i}"} | headers, **PROD)

    ask(*HELLO)
    counts = tone.canaries.get("tone").counts
    both = counts.stable + counts.canary
    assert (both.num_requests, both.num_errors, both.ttft.num, both.itl.num) == (4, 0, 4, 4)
    ask(Overloaded("too many", 1.0))  # 429
    ask(DeadlineExceeded("late"), **{"X-Request-Timeout-S": "1"})  # its own deadline
    ask(BaseStarting("not ready", 10.0))
    ask(*HELLO, cold=True)  # the wait for a replica
    assert tone.canaries.get("tone").counts == counts
    ask(delta("he"), DeadlineExceeded("late"))
    found = tone.canaries.get("tone").counts
    both = found.stable + found.canary
    assert (both.num_requests, both.num_errors, both.ttft.num) == (8, 4, 4)


async def test_reports_wait_for_the_catalog_and_stop_with_the_canary() -> None:
    asked: list[Mapping[int, CanaryCounts]] = []
    answers: list[ReportAnswer | Exception] = [
        CatalogError("away"),
        ReportAnswer(frozenset(), ()),
        ReportAnswer(frozenset({7}), (EndedCanary("tone@3", "tone@prod", "ttft", "slow"),)),
        ReportAnswer(frozenset(), ()),
    ]

    class Told:
        def report(self, gateway: str, counted: Mapping[int, CanaryCounts]) -> ReportAnswer:
            asked.append(counted)
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    async def ask(question: Callable[[Catalog], ReportAnswer]) -> ReportAnswer:
        return question(cast(Catalog, SimpleNamespace(canaries=Told())))

    canaries = CanaryCounters(ask, GatewayMetrics("local"))
    await canaries.report()
    assert asked == []  # nothing to say
    received_at = asyncio.get_running_loop().time()
    for is_canary in (True, True, False, True):
        meter = canaries.meter(Arm(7, is_canary), received_at, has_timeout=False)
        assert meter is not None
        meter.came()
        meter.end("ok", None)
        await canaries.report()
    totals = [(counts[7].canary.num_requests, counts[7].stable.num_requests) for counts in asked]
    assert totals == [(1, 0), (2, 0), (2, 1), (1, 0)]  # the last is of what came after the end
    assert canaries.meter(None, received_at, has_timeout=False) is None
