"""GET /metrics: one exposition of a gateway and its replicas, with exactly the metrics of the table."""

from __future__ import annotations

import asyncio
import pickle
import re
import shutil
import subprocess
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.errors import EngineError
from loray.telemetry import ENGINE_METRICS, GATEWAY_METRICS, METRICS, REQUEST_METRICS
from serve_apps.accounting.usage import UsageStatus
from serve_apps.catalog_watch import CatalogWatcher
from serve_apps.exposition import encode, merge
from serve_apps.gateway.directory import ModelResolver
from serve_apps.gateway.metrics import BaseMetrics, CountRequests, GatewayMetrics, together
from serve_apps.gateway.replicas.router import decisions
from serve_apps.replica.metrics import engine_families
from tests.fixtures.engines import make_engine
from tests.fixtures.gateway import ScriptedEngines, delta, register
from tests.fixtures.replica import observed


@pytest.fixture(scope="module")
def whole(base: BaseModel) -> list[Family]:
    """The families of a gateway with two replicas that have served one request each, and a silent third one."""
    replicas: list[list[Family] | None] = [None]
    for name in ("r1", "r2"):
        with observed(base) as asked:
            asyncio.run(asked.ask(3))
            families = asked.metrics.families(asyncio.run(asked.settled(1)), name)
        replicas.append(pickle.loads(pickle.dumps(families)))
    gateway = GatewayMetrics("g1")
    gateway.keys_age_s = lambda: 2.0
    gateway.answered("/v1/completions", 200)
    directory: Any = ModelResolver([base], CatalogWatcher(lambda: cast("Any", None)))
    routed, resumes = {base.name: decisions("engine-tiny")}, {base.name: {"lost": 0, "moved": 0}}
    return together(
        [gateway.families(directory, routed, resumes, 2, UsageStatus(True, 9, 1.5, 0)), None],
        {base.name: BaseMetrics(3, replicas)},
    )


def test_every_metric_of_the_table_is_exposed_once_and_nothing_else(whole: list[Family]) -> None:
    text = encode(whole, "").body.decode()
    types = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    assert sorted(types) == sorted((m.name, m.kind) for m in METRICS.values())
    helps = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE))
    assert helps == {m.name: m.help for m in METRICS.values()}
    by_name = {f"{f.name}_total" if f.type == "counter" else f.name: f for f in whole}
    for metric in METRICS.values():
        expected = {*metric.labels, *(["le"] * (metric.kind == "histogram"))}
        if metric in (*REQUEST_METRICS.values(), *ENGINE_METRICS.values()):
            expected |= {"replica", "base"}
        if metric in GATEWAY_METRICS.values():
            expected.add("gateway")
        for sample in by_name[metric.name].samples:
            assert set(sample.labels) - {"le"} == expected - {"le"}, sample


def test_a_family_contains_all_replicas(whole: list[Family]) -> None:
    families = {f.name: f.samples for f in parse(encode(whole, "").body.decode())}
    first = families["loray_time_to_first_token_seconds"]
    assert [s.labels["replica"] for s in first if s.labels.get("le") == "+Inf"] == ["r1", "r2"]
    names = ("replicas_reporting", "replicas_silent", "gateways_reporting", "gateways_silent")
    assert [families[f"loray_{name}"][0].value for name in names] == [2, 1, 1, 1]


def test_openmetrics_on_request(whole: list[Family]) -> None:
    body, content_type = encode(whole, "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert {f.name for f in parse_openmetrics(body.decode())} == {
        m.name.removesuffix("_total") for m in METRICS.values()
    }


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool on PATH")
def test_promtool_accepts_the_exposition(whole: list[Family]) -> None:
    promtool = subprocess.run(["promtool", "check", "metrics"], input=encode(whole, "").body, capture_output=True)
    assert (promtool.returncode, promtool.stdout, promtool.stderr) == (0, b"", b"")


def test_merging_leaves_the_groups_as_they_are(base: BaseModel) -> None:
    families = list(engine_families(make_engine(base).stats()))
    before = [len(f.samples) for f in families]
    assert [len(f.samples) for f in merge([families, families])] == [2 * n for n in before]
    assert [len(f.samples) for f in families] == before


def test_each_gateway_has_its_own_requests(base: BaseModel) -> None:
    """Whichever gateway answers, the answer is the same."""
    directory: Any = ModelResolver([base], CatalogWatcher(lambda: cast("Any", None)))
    gateways: list[list[Family] | None] = []
    for name, num_requests in (("g1", 3), ("g2", 4)):
        counted = GatewayMetrics(name)
        for _ in range(num_requests):
            counted.answered("/v1/completions", 200)
        gateways.append(counted.families(directory, {base.name: {"pool": num_requests}}, {}, 0))
    samples = {
        (s.name, s.labels.get("gateway")): s.value
        for f in parse(encode(together(gateways, {}), "").body.decode())
        for s in f.samples
        if s.labels.get("reason") in (None, "pool")
    }
    for name in ("loray_http_requests_total", "loray_routing_decisions_total"):
        assert (samples[name, "g1"], samples[name, "g2"]) == (3, 4)
    assert samples["loray_gateways_reporting", None] == 2


def test_metrics_are_the_replicas_and_the_gateways_own(client_of: Any, base: BaseModel, catalog: Catalog) -> None:
    register(catalog, "tone", base.fingerprint)
    engines = ScriptedEngines([delta("hello", "stop")])
    for name, num_tokens in (("r1", 3), ("r2", 4)):
        family = CounterMetricFamily("loray_generation_tokens", "Tokens generated.", labels=["replica"])
        family.add_metric([name], num_tokens)
        engines.families.append([family])
    engines.families.append(None)
    with client_of(engines) as client:
        for stream in (False, False, True):
            assert client.complete(stream=stream).status_code == 200
        client.complete(model="nobody")
        for path in ("/v1/completions", "/v1/models/tone@1", "/wp-login.php"):
            client.get(path)
        engines.script = [ZeroDivisionError()]
        client.complete()
        response = client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = {
        (s.name, *(value for label, value in s.labels.items() if label not in ("gateway", "base"))): s.value
        for f in parse(response.text)
        for s in f.samples
    }
    answered = {key[1:]: n for key, n in samples.items() if key[0] == "loray_http_requests_total"}
    assert answered == {
        ("200", "/v1/completions"): 3,
        ("404", "/v1/completions"): 1,
        ("405", "/v1/completions"): 1,
        ("500", "/v1/completions"): 1,
        ("200", "/v1/models/{model:path}"): 1,
        ("404", "unknown"): 1,
    }
    assert (samples["loray_generation_tokens_total", "r1"], samples["loray_generation_tokens_total", "r2"]) == (3, 4)
    assert (samples["loray_replicas_reporting",], samples["loray_replicas_silent",]) == (2, 1)
    assert samples["loray_catalog_adapters",] == 1
    assert 0 <= samples["loray_catalog_age_seconds",] < 60
    assert 0 <= samples["loray_keys_age_seconds",] < 60
    assert samples["loray_http_requests_in_flight",] == 1  # the scrape
    assert samples["loray_http_requests_waiting",] == 0


async def test_a_request_under_way_is_in_flight_until_its_client_has_left() -> None:
    counted = GatewayMetrics("g1")
    in_flight: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        in_flight.append(counted.num_in_flight)
        if scope["path"] == "/cancelled":
            raise asyncio.CancelledError
        await send({"type": "http.response.start", "status": 200, "headers": []})

    counting = CountRequests(app, counted)
    await counting({"type": "http", "path": "/"}, AsyncMock(), AsyncMock())
    with pytest.raises(asyncio.CancelledError):
        await counting({"type": "http", "path": "/cancelled"}, AsyncMock(), AsyncMock())
    assert (in_flight, counted.num_in_flight) == ([1, 1], 0)
    samples = [s for f in counted._registry.collect() for s in f.samples if s.name == "loray_http_requests_total"]
    codes = {s.labels["code"]: s.value for s in samples}
    assert codes == {"200": 1, "499": 1}


def outcomes(text: str, route: str) -> dict[str, float]:
    lines = re.findall(r"loray_requests_total{(.*)} (.+)", text)
    named = [(dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(n)) for labels, n in lines]
    return {labels["outcome"]: n for labels, n in named if labels["route"] == route}


def test_answers_that_break_off_are_counted_as_broken(client_of: Any) -> None:
    engines = ScriptedEngines([delta("a"), EngineError("the engine was killed")])
    with client_of(engines) as client:
        for _ in range(10):
            answer = client.complete(stream=True)
            assert answer.status_code == 200
            assert "engine_unavailable" in answer.text
        engines.script = [EngineError("the engine was killed")]
        client.complete(stream=True)
        engines.script = [delta("a", "stop")]
        client.complete(stream=True)
        client.complete(n=0)
        counted = outcomes(client.get("/metrics").text, "/v1/completions")
    assert counted == {"broken": 10, "failed": 1, "ok": 1, "client_error": 1}
