"""GET /metrics: one exposition of a gateway and its replicas, with exactly the metrics of the table."""

from __future__ import annotations

import asyncio
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient
from prometheus_client.core import CounterMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.telemetry import ENGINE_METRICS, GATEWAY_METRICS, METRICS, REQUEST_METRICS
from serve_apps.accounting.usage import UsageStatus
from serve_apps.catalog_watch import CatalogWatcher
from serve_apps.exposition import encode, merge
from serve_apps.gateway.directory import ModelResolver
from serve_apps.gateway.metrics import BaseMetrics, CountRequests, GatewayMetrics, together
from serve_apps.gateway.replicas.router import decisions
from serve_apps.replica.metrics import engine_families
from tests.engine.harness import make_engine
from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.gateway.scripted import ScriptedEngines, delta, gateway_app, register
from tests.serve_apps.replica.test_metrics import ObservedEngine, go


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base()


@pytest.fixture
def whole(base: BaseModel) -> list[Family]:
    """The families of a gateway with two replicas that have served one request each, and a silent third one."""
    replicas: list[list[Family] | None] = [None]
    for name in ("r1", "r2"):
        asked = ObservedEngine(base)

        async def test(asked: ObservedEngine = asked, name: str = name) -> None:
            await asked.ask(3)
            families = asked.metrics.families(await asked.settled(1), name)
            replicas.append(pickle.loads(pickle.dumps(families)))

        go(asked, test)
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


def test_a_family_contains_all_replicas(whole: list[Family], base: BaseModel) -> None:
    body, content_type = encode(whole, "")
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    families = {f.name: f for f in parse(body.decode())}
    tokens = families["loray_generation_tokens"].samples
    assert [(s.name, s.labels, s.value) for s in tokens] == [
        ("loray_generation_tokens_total", {"base": base.name, "replica": "r1"}, 4),
        ("loray_generation_tokens_total", {"base": base.name, "replica": "r2"}, 4),
    ]
    assert families["loray_replicas_reporting"].samples[0].value == 2
    assert families["loray_replicas_silent"].samples[0].value == 1
    assert (
        families["loray_gateways_reporting"].samples[0].value == families["loray_gateways_silent"].samples[0].value == 1
    )
    first = families["loray_time_to_first_token_seconds"].samples
    assert [s.labels["replica"] for s in first if s.labels.get("le") == "+Inf"] == ["r1", "r2"]


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


# -- over HTTP ---------------------------------------------------------------------------------------------------------


def test_metrics_are_the_replicas_and_the_gateways_own(base: BaseModel, tmp_path: Path) -> None:
    register(Catalog(sqlite_catalog(tmp_path)), "tone", base.fingerprint)
    engines = ScriptedEngines([delta("hello", "stop")])
    for name, num_tokens in (("r1", 3), ("r2", 4)):
        family = CounterMetricFamily("loray_generation_tokens", "Tokens generated.", labels=["replica"])
        family.add_metric([name], num_tokens)
        engines.families.append([family])
    engines.families.append(None)
    body = {"model": base.name, "prompt": "abc"}
    app = gateway_app(base, sqlite_catalog(tmp_path), engines)
    with TestClient(app, raise_server_exceptions=False) as client:
        for _ in range(2):
            assert client.post("/v1/completions", json=body).status_code == 200
        client.post("/v1/completions", json=body | {"stream": True})
        client.post("/v1/completions", json=body | {"model": "nobody"})
        client.get("/v1/completions")
        client.get("/v1/models/tone@1")
        client.get("/wp-login.php")
        engines.script = [ZeroDivisionError()]
        client.post("/v1/completions", json=body)
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


def test_a_request_under_way_is_in_flight_until_its_client_has_left() -> None:
    counted = GatewayMetrics("g1")
    in_flight: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        in_flight.append(counted.num_in_flight)
        if scope["path"] == "/cancelled":
            raise asyncio.CancelledError
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(_: Any) -> None:
        pass

    async def run() -> None:
        counting = CountRequests(app, counted)
        await counting({"type": "http", "path": "/"}, None, send)  # type: ignore[arg-type]
        with pytest.raises(asyncio.CancelledError):
            await counting({"type": "http", "path": "/cancelled"}, None, send)  # type: ignore[arg-type]

    asyncio.run(run())
    assert (in_flight, counted.num_in_flight) == ([1, 1], 0)
    samples = [s for f in counted._registry.collect() for s in f.samples if s.name == "loray_http_requests_total"]
    codes = {s.labels["code"]: s.value for s in samples}
    assert codes == {"200": 1, "499": 1}
