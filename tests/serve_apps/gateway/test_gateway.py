"""The gateway's HTTP API on scripted engines: the behaviour that OpenAI's clients rely on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.schemas.status import AutoscalingStatus, ScalingDecision
from serve_apps.gateway.directory import REFRESH_S
from tests.serve_apps.gateway.scripted import REPLICA, ScriptedEngines, delta, register

HELLO = (delta("hel"), delta("lo", "stop"))
CHAT = [{"role": "user", "content": "hi"}]


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return dict(body["error"])


def events_of(response: Any) -> list[Any]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines.pop() == ""
    data = [line.removeprefix("data: ") for line in lines]
    return [d if d == "[DONE]" else json.loads(d) for d in data]


def test_completion(client_of: Any, base: BaseModel) -> None:
    engines = ScriptedEngines(HELLO)
    with client_of(engines) as client:
        r = client.post(
            "/v1/completions", json={"model": base.name, "prompt": "abc", "max_tokens": 5, "temperature": 0}
        )
    body = r.json()
    assert body["choices"] == [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    assert body["id"].startswith("cmpl-")
    assert body["id"] == r.headers["x-request-id"]
    assert body["model"] == base.name
    assert body["system_fingerprint"].startswith("loray-")
    (request,) = engines.requests
    assert request.prompt_ids == tuple(b"abc"[i] - 33 for i in range(3))
    assert (request.params.max_tokens, request.params.temperature, request.adapter) == (5, 0.0, None)


def test_chat_completion_uses_the_chat_template(client_of: Any, base: BaseModel) -> None:
    engines = ScriptedEngines(HELLO)
    with client_of(engines) as client:
        body = client.post("/v1/chat/completions", json={"model": base.name, "messages": CHAT}).json()
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hello", "refusal": None}
    assert body["id"].startswith("chatcmpl-")
    (request,) = engines.requests
    assert request.prompt_ids[0] == 257
    assert request.params.max_tokens == 512 - len(request.prompt_ids)  # the rest of the context


def test_streams(client_of: Any, base: BaseModel) -> None:
    stream = {"model": base.name, "stream": True, "stream_options": {"include_usage": True}}
    with client_of(ScriptedEngines(HELLO)) as client:
        *chat, usage, done = events_of(client.post("/v1/chat/completions", json=stream | {"messages": CHAT}))
        assert [c["choices"][0]["delta"] for c in chat] == [
            {"role": "assistant", "content": ""},
            {"content": "hel"},
            {"content": "lo"},
        ]
        assert chat[-1]["choices"][0]["finish_reason"] == "stop"
        assert usage["usage"]["completion_tokens"] == 6
        assert done == "[DONE]"
        *plain, done = events_of(
            client.post("/v1/completions", json={"model": base.name, "stream": True, "prompt": "abc"})
        )
        assert [c["choices"][0]["text"] for c in plain] == ["hel", "lo"]
        assert "usage" not in plain[0]


def test_prompts_times_n_are_choices_in_order(client_of: Any, base: BaseModel) -> None:
    engines = ScriptedEngines(HELLO)
    fields = {"model": base.name, "prompt": [[1, 2, 3], [4, 5, 6]], "n": 2, "seed": 10}
    with client_of(engines) as client:
        body = client.post("/v1/completions", json=fields).json()
        events = events_of(client.post("/v1/completions", json=fields | {"stream": True}))
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"] == {"prompt_tokens": 6, "completion_tokens": 24, "total_tokens": 30}
    assert sorted(c["choices"][0]["index"] for c in events[:-1]) == [0, 0, 1, 1, 2, 2, 3, 3]
    first = engines.requests[:4]
    assert [r.prompt_ids[0] for r in first] == [1, 1, 4, 4]
    assert [r.params.seed for r in first] == [10, 11, 10, 11]
    assert len({r.request_id for r in engines.requests}) == 8


def test_names_resolve_to_one_version_each(client_of: Any, base: BaseModel, catalog: Catalog) -> None:
    for _ in range(3):
        register(catalog, "tone", base.fingerprint)
    catalog.promote("tone", "canary", 2)
    engines = ScriptedEngines(HELLO)
    with client_of(engines) as client:
        for model in ("tone", "tone@1", "tone@canary"):
            body = client.post("/v1/completions", json={"model": model, "prompt": "a"}).json()
            assert body["model"] == model
    assert [r.adapter.label for r in engines.requests if r.adapter] == ["tone@3", "tone@1", "tone@2"]


def test_what_is_published_or_promoted_while_serving_is_seen(client_of: Any, base: BaseModel, catalog: Catalog) -> None:
    engines = ScriptedEngines(HELLO)
    with client_of(engines) as client:
        fields = {"model": "tone", "prompt": "a"}
        assert client.post("/v1/completions", json=fields).status_code == 404
        register(catalog, "tone", base.fingerprint)
        assert client.post("/v1/completions", json=fields).status_code == 200  # at once: an unknown name is looked up
        register(catalog, "tone", base.fingerprint)
        deadline = time.monotonic() + 20 * REFRESH_S
        while engines.requests[-1].adapter.label != "tone@2" and time.monotonic() < deadline:  # type: ignore[union-attr]
            client.post("/v1/completions", json=fields)
        assert engines.requests[-1].adapter.label == "tone@2"  # type: ignore[union-attr]


def test_serving_survives_the_catalog(client_of: Any, base: BaseModel, catalog: Catalog, tmp_path: Path) -> None:
    register(catalog, "tone", base.fingerprint)
    with client_of(ScriptedEngines(HELLO)) as client:
        catalog.close()
        for file in tmp_path.glob("catalog.db*"):
            file.write_bytes(b"not a database")
        assert client.post("/v1/completions", json={"model": "tone", "prompt": "a"}).status_code == 200
        assert error_of(client.post("/v1/completions", json={"model": "other", "prompt": "a"}), 404)["code"]
        status = client.get("/status").json()
    assert status["status"] == "degraded"
    assert status["catalog"]["num_adapters"] == 1
    assert status["catalog"]["failure"]


def test_models(client_of: Any, base: BaseModel, catalog: Catalog) -> None:
    register(catalog, "tone", base.fingerprint, context_length=1024)
    register(catalog, "tone", base.fingerprint, context_length=1024)
    register(catalog, "other", "f" * 64)
    catalog.promote("tone", "prod", 1)
    with client_of(ScriptedEngines(HELLO), max_model_len=900) as client:
        body = client.get("/v1/models").json()
        assert [m["id"] for m in body["data"]] == [base.name, "tone"]
        assert body["data"][0] | {"created": 0} == {
            "id": base.name,
            "object": "model",
            "created": 0,
            "owned_by": "loray",
            "root": base.name,
            "parent": None,
            "max_model_len": 512,
        }
        tone = body["data"][1]
        assert (tone["root"], tone["parent"], tone["max_model_len"]) == ("tone@1", base.name, 900)
        assert (tone["aliases"], tone["versions"], tone["method"]) == ({"prod": 1}, [2, 1], "lora")
        assert client.get("/v1/models/tone@2").json()["root"] == "tone@2"
        assert client.get(f"/v1/models/{base.name}").json()["id"] == base.name
        assert error_of(client.get("/v1/models/nobody"), 404)["code"] == "model_not_found"


def test_pages_of_models(client_of: Any, base: BaseModel, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_apps.gateway.directory._AT_ONCE", 2)
    names = [base.name, *sorted(f"{first}{i}" for first in "az" for i in range(3))]
    for name in names[1:]:
        register(catalog, name, base.fingerprint)
    register(catalog, "b-other", "f" * 64)
    with client_of(ScriptedEngines(HELLO)) as client:
        whole = client.get("/v1/models").json()
        assert [m["id"] for m in whole["data"]] == names
        assert (whole["first_id"], whole["last_id"], whole["has_more"]) == (base.name, "z2", False)
        for limit in (1, 2, 3, 7):
            found, after, has_more = [], None, True
            while has_more:
                params = {"limit": limit} | ({} if after is None else {"after": after})
                page = client.get("/v1/models", params=params).json()
                assert len(page["data"]) <= limit
                found += [m["id"] for m in page["data"]]
                after, has_more = page["last_id"], page["has_more"]
            assert found == names
        beyond = client.get("/v1/models", params={"after": "zz"}).json()
        assert beyond == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
        assert error_of(client.get("/v1/models", params={"limit": 0}), 400)["param"] == "limit"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_unknown_model(client_of: Any, base: BaseModel, catalog: Catalog, path: str) -> None:
    register(catalog, "tone", base.fingerprint)
    with client_of(ScriptedEngines(HELLO)) as client:
        for model in ("tome", "tone@7", "tone@canary", "tone@", "@1", "\u00e9"):
            for stream in (False, True):
                body = (
                    {"model": model, "prompt": "a"} if path == "/v1/completions" else {"model": model, "messages": CHAT}
                )
                error = error_of(client.post(path, json=body | {"stream": stream}), 404)
                assert (error["code"], error["param"], error["type"]) == (
                    "model_not_found",
                    "model",
                    "invalid_request_error",
                )
                assert model in error["message"]


def test_adapter_of_another_base(client_of: Any, catalog: Catalog) -> None:
    register(catalog, "alien", "f" * 64)
    with client_of(ScriptedEngines(HELLO)) as client:
        error = error_of(client.post("/v1/completions", json={"model": "alien", "prompt": "a"}), 404)
    assert error["code"] == "base_mismatch"
    assert "another base" in error["message"]


_HALF_A_PAIR = (b'{"prompt": "\\ud800"}', b'{"prompt": "\xed\xa0\x80"}')


def test_health_and_status(client_of: Any, base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_apps.gateway.bases.FRESH_S", 0.0)
    engines = ScriptedEngines()
    with client_of(engines, num_replicas=1) as client:
        assert client.get("/health").json() == {"status": "ok"}
        status = client.get("/status").json()
        assert (status["status"], status["totals"]["num_running"]) == ("ok", 1)
        (served,) = status["bases"]
        assert (served["base"], served["status"], served["num_replicas"], served["target"]) == (base.name, "ok", 1, 1)
        assert status["replicas"][0]["adapters_in_pool"] == ["0" * 12]
        engines.replicas = [REPLICA.model_copy(update={"replica": n, "layout": (("kv", 2),)}) for n in ("a", "b")]
        for asked, holding in (("", []), ("?layout=true", ["a", "b"]), ("?layout=true&replica=b&replica=c", ["b"])):
            replicas = client.get(f"/status{asked}").json()["replicas"]
            assert [r["replica"] for r in replicas if r["layout"]] == holding
        engines.replicas = []
        assert error_of(client.get("/health"), 503)["code"] == "engine_unavailable"
        assert client.get("/status").json()["status"] == "degraded"


def test_status_says_what_the_autoscaler_decided(client_of: Any) -> None:
    engines = ScriptedEngines()
    decision = ScalingDecision(time=1.0, from_replicas=1, to_replicas=2, reason="tokens need 2 replicas")
    engines.scaling = AutoscalingStatus(target=2, reason="tokens need 2 replicas", time=3.0, decisions=(decision,))
    with client_of(engines, num_replicas=2, autoscaling={"min_replicas": 1, "max_replicas": 2}) as client:
        status = client.get("/status").json()
    assert status["status"] == "degraded"  # one replica of the two that demand requires
    (served,) = status["bases"]
    assert served["target"] == served["autoscaling"]["target"] == 2
    assert served["autoscaling"]["decisions"] == [decision.model_dump()]
    with client_of(engines, num_replicas=1) as client:
        assert client.get("/status").json()["bases"][0]["autoscaling"] is None


def test_openapi_describes_the_bodies(client_of: Any) -> None:
    with client_of(ScriptedEngines()) as client:
        document = client.get("/openapi.json").json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = body["$ref"].rpartition("/")[2]
    assert "messages" in document["components"]["schemas"][name]["properties"]
    assert "ChatMessage" in document["components"]["schemas"]


def test_tenant_priority_slo_and_salt_reach_the_engine(client_of: Any, base: BaseModel) -> None:
    engines = ScriptedEngines(HELLO)
    body = {"model": base.name, "prompt": "a", "user": "body", "priority": -2, "ttft_slo_s": 1.5, "cache_salt": "s"}
    with client_of(engines) as client:
        client.post("/v1/completions", json=body, headers={"X-Tenant-Id": "header"})
        client.post("/v1/completions", json=body)
        client.post("/v1/chat/completions", json={"model": base.name, "messages": CHAT})
        client.post("/v1/chat/completions", json={"model": base.name, "messages": CHAT}, headers={"X-Tenant-Id": "t"})
        wrong = client.post("/v1/completions", json=body | {"ttft_slo_s": 0})
    assert [(r.tenant, r.priority, r.ttft_slo_s, r.cache_salt) for r in engines.requests] == [
        ("header", -2, 1.5, "header/s"),
        ("body", -2, 1.5, "s"),
        ("", 0, None, ""),
        ("t", 0, None, "t/"),
    ]
    assert error_of(wrong, 400)["param"] == "ttft_slo_s"
