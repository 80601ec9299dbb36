"""One gateway of two bases, on scripted engines: every name finds its base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.core import CounterMetricFamily

from loray.bases.registry import BaseModel, get_bases
from loray.catalog import Catalog
from loray.errors import SpecError
from loray.schemas.status import AutoscalingStatus
from loray.spec import AutoscalingSpec, Principal, ServeSpec
from serve_apps.gateway.bases import ServedBase
from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.gateway.scripted import ScriptedEngines, delta, fleet_app, register
from tests.serve_apps.gateway.test_gateway import CHAT, error_of


class Fleet:
    """Two bases, `one` with an adapter `of-one` and `two` with `of-two`; each says its name."""

    def __init__(self, one: BaseModel, two: BaseModel, catalog: Catalog) -> None:
        self.one, self.two = one, two
        register(catalog, "of-one", one.fingerprint)
        register(catalog, "of-two", two.fingerprint, context_length=128)
        register(catalog, "alien", "f" * 64)
        self.engines = {base.name: ScriptedEngines([delta(base.name, "stop")]) for base in (one, two)}
        limits = {one.name: None, two.name: 200}
        self.served = [
            ServedBase.open(ServeSpec(base=b.name, max_model_len=limits[b.name]), b, self.engines[b.name])
            for b in (one, two)
        ]
        self.client: TestClient

    def said(self, model: str) -> str:
        response = self.client.post("/v1/completions", json={"model": model, "prompt": "a"})
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])


@pytest.fixture
def fleet(base: BaseModel, tiny_base: Callable[..., BaseModel], catalog: Catalog, tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(base, tiny_base(max_position_embeddings=256), catalog)
    with TestClient(fleet_app(made.served, sqlite_catalog(tmp_path)), raise_server_exceptions=False) as client:
        made.client = client
        yield made


def test_a_name_goes_to_its_base(fleet: Fleet) -> None:
    one, two = fleet.one.name, fleet.two.name
    asked = (one, "of-one", "of-one@1", f"{one}:of-one", two, "of-two", f"{two}:of-two", f"{two}:{two}")
    assert [fleet.said(model) for model in asked] == [one] * 4 + [two] * 4
    requests = fleet.engines[two].requests
    assert [r.adapter and r.adapter.name for r in requests] == [None, "of-two", "of-two", None]
    chat = fleet.client.post("/v1/chat/completions", json={"model": "of-two", "messages": CHAT}).json()
    plain = fleet.client.post("/v1/completions", json={"model": one, "prompt": "a"}).json()
    assert chat["choices"][0]["message"]["content"] == two
    assert chat["system_fingerprint"].endswith(fleet.two.fingerprint[:12])
    assert plain["system_fingerprint"].endswith(fleet.one.fingerprint[:12])


def test_each_base_has_its_own_limit(fleet: Fleet) -> None:
    cards = {card["id"]: card for card in fleet.client.get("/v1/models").json()["data"]}
    assert list(cards) == [fleet.one.name, fleet.two.name, "of-one", "of-two"]
    assert [card["parent"] for card in cards.values()] == [None, None, fleet.one.name, fleet.two.name]
    assert [card["max_model_len"] for card in cards.values()] == [512, 200, 512, 128]
    too_long = {"prompt": [7] * 150, "max_tokens": 100}
    assert fleet.client.post("/v1/completions", json=too_long | {"model": fleet.one.name}).status_code == 200
    refused = fleet.client.post("/v1/completions", json=too_long | {"model": fleet.two.name})
    assert error_of(refused, 400)["code"] == "context_length_exceeded"


def test_pages_of_models_go_over_all_bases(fleet: Fleet) -> None:
    seen: list[str] = []
    while page := fleet.client.get("/v1/models", params={"limit": 1} | ({"after": seen[-1]} if seen else {})).json():
        seen += [card["id"] for card in page["data"]]
        if not page["has_more"]:
            break
    assert seen == [fleet.one.name, fleet.two.name, "of-one", "of-two"]
    assert fleet.client.get(f"/v1/models/{fleet.two.name}").json()["root"] == fleet.two.name
    assert fleet.client.get("/v1/models/of-two").json()["parent"] == fleet.two.name


def test_an_adapter_of_a_base_that_is_not_served(fleet: Fleet) -> None:
    error = error_of(fleet.client.post("/v1/completions", json={"model": "alien", "prompt": "a"}), 404)
    assert error["code"] == "base_mismatch"
    assert f"{fleet.one.name} and {fleet.two.name}, which this deployment serves" in error["message"]
    other = {"model": f"{fleet.one.name}:of-two", "prompt": "a"}
    assert error_of(fleet.client.post("/v1/completions", json=other), 404)["code"] == "base_mismatch"
    other = {"model": f"{fleet.one.name}:{fleet.two.name}", "prompt": "a"}
    assert error_of(fleet.client.post("/v1/completions", json=other), 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": CHAT}),
        ("/v1/responses", {"input": "a"}),
        ("/tokenize", {"prompt": "a"}),
        ("/tokenize", {"messages": CHAT}),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_there_is_no_default_base(fleet: Fleet, path: str, body: dict[str, Any]) -> None:
    error = error_of(fleet.client.post(path, json=body), 400)
    assert error["param"] == "model"
    assert f"{fleet.one.name} and {fleet.two.name}" in error["message"]


def test_messages_name_what_the_key_is_for(fleet: Fleet) -> None:
    directory = fleet.client.app.state.gateway.directory  # type: ignore[attr-defined]
    one, two = fleet.one.name, fleet.two.name
    asked = (None, frozenset((two, "of-one")), frozenset(("of-one",)))
    assert [directory.base_names(Principal(models=m)) for m in asked] == [f"{one} and {two}", two, ""]


def test_health_and_status_say_which_base(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_apps.gateway.bases.FRESH_S", 0.0)
    one, two = fleet.one.name, fleet.two.name
    status = fleet.client.get("/status").json()
    assert [(b["base"], b["status"], b["num_replicas"], b["num_adapters"]) for b in status["bases"]] == [
        (one, "ok", 1, 1),
        (two, "ok", 1, 1),
    ]
    assert ([r["base"] for r in status["replicas"]], status["totals"]["num_running"]) == ([one, two], 2)
    fleet.engines[two].replicas = []
    assert fleet.client.get("/health").json() == {"status": "degraded", "num_unavailable": 1}
    status = fleet.client.get("/status").json()
    assert (status["status"], [b["status"] for b in status["bases"]]) == ("degraded", ["ok", "degraded"])
    assert fleet.said(one) == one
    fleet.engines[one].replicas = []
    assert error_of(fleet.client.get("/health"), 503)["code"] == "engine_unavailable"


def test_a_base_that_is_asleep_is_well(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_apps.gateway.bases.FRESH_S", 0.0)
    one, two = fleet.one.name, fleet.two.name
    served = fleet.served[1]
    asleep = AutoscalingSpec(min_replicas=0)
    served.spec = served.spec.model_copy(update={"autoscaling": asleep})
    engines = fleet.engines[two]
    engines.replicas, engines.cold = [], True
    engines.scaling = AutoscalingStatus(target=0, reason="no request", time=1.0)
    assert fleet.client.get("/health").json() == {"status": "ok"}
    status = fleet.client.get("/status").json()
    assert (status["status"], [b["status"] for b in status["bases"]]) == ("ok", ["ok", "asleep"])
    text = fleet.client.get("/metrics").text
    assert [f'loray_replicas_wanted{{base="{name}"}} {n}.0' in text for name, n in ((one, 1), (two, 0))] == [True] * 2
    engines.scaling = AutoscalingStatus(target=1, reason="a request waits", time=2.0)
    assert fleet.client.get("/health").json() == {"status": "ok"}  # the next request waits with it
    engines.failed = True
    assert fleet.client.get("/health").json() == {"status": "degraded", "num_unavailable": 1}
    assert fleet.client.get("/status").json()["bases"][1]["status"] == "degraded"


def test_metrics_say_which_base(fleet: Fleet) -> None:
    for base in (fleet.one, fleet.two):
        family = CounterMetricFamily("loray_generation_tokens", "Tokens generated.", labels=["replica"])
        family.add_metric(["r"], 3)
        fleet.engines[base.name].families.append([family])
    fleet.engines[fleet.two.name].families.append(None)
    text = fleet.client.get("/metrics").text
    for base, num_silent in ((fleet.one, 0), (fleet.two, 1)):
        assert f'loray_generation_tokens_total{{base="{base.name}",replica="r"}} 3.0' in text
        assert f'loray_replicas_reporting{{base="{base.name}"}} 1.0' in text
        assert f'loray_replicas_silent{{base="{base.name}"}} {num_silent}.0' in text
        assert f'loray_catalog_adapters{{base="{base.name}",gateway="local"}} 1.0' in text


def test_one_model_is_served_once(tmp_path: Path, base: BaseModel) -> None:
    (tmp_path / "bases").mkdir()
    for name in ("a", "b"):
        (tmp_path / "bases" / name).symlink_to(base.path)
    with pytest.raises(SpecError, match="the bases a and b are the same model"):
        get_bases(tmp_path, ["a", "b"])
    assert [found.name for found in get_bases(tmp_path, ["b"])] == ["b"]
