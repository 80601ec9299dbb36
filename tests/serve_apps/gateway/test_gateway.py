"""The gateway's HTTP API on scripted engines: the behaviour that OpenAI's and vLLM's clients rely on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from loray import __version__
from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.schemas.status import AutoscalingStatus, ScalingDecision
from loray.spec import TokenDelta
from tests.fixtures.gateway import CHAT, HELLO, ScriptedEngines, delta, error_of, events_of, register
from tests.fixtures.tiny import byte_tokenizer


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at a status asks the engines."""
    monkeypatch.setattr("serve_apps.gateway.bases.FRESH_S", 0.0)


# -- answers ----------------------------------------------------------------------------------------------------------


def test_completion(client_of: Any, base: BaseModel) -> None:
    engines = ScriptedEngines(HELLO)
    with client_of(engines) as client:
        r = client.complete(prompt="abc", max_tokens=5, temperature=0)
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


def test_chat_completion_uses_the_chat_template(client_of: Any) -> None:
    engines = ScriptedEngines(HELLO)
    with client_of(engines) as client:
        body = client.chat().json()
        client.chat(max_completion_tokens=5)
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hello", "refusal": None}
    assert body["id"].startswith("chatcmpl-")
    request, _ = engines.requests
    assert request.prompt_ids[0] == 257
    assert request.params.max_tokens == 512 - len(request.prompt_ids)  # the rest of the context
    assert engines.fits == [True, False]  # only a default may be lowered by the replica


def test_prompts_times_n_are_choices_in_order(client_of: Any) -> None:
    engines = ScriptedEngines(HELLO)
    fields = {"prompt": [[1, 2, 3], [4, 5, 6]], "n": 2, "seed": 10}
    with client_of(engines) as client:
        body = client.complete(**fields).json()
        events = events_of(client.complete(**fields, stream=True))
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"] == {"prompt_tokens": 6, "completion_tokens": 24, "total_tokens": 30}
    assert sorted(c["choices"][0]["index"] for c in events[:-1]) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [(r.prompt_ids[0], r.params.seed) for r in engines.requests[:4]] == [(1, 10), (1, 11), (4, 10), (4, 11)]
    assert len({r.request_id for r in engines.requests}) == 8


def test_tenant_priority_slo_and_salt_reach_the_engine(client_of: Any) -> None:
    engines = ScriptedEngines(HELLO)
    body = {"user": "body", "priority": -2, "ttft_slo_s": 1.5, "cache_salt": "s"}
    with client_of(engines) as client:
        client.complete({"X-Tenant-Id": "header"}, **body)
        client.complete(**body)
        client.chat()
        client.chat({"X-Tenant-Id": "t"})
        assert error_of(client.complete(ttft_slo_s=0), 400)["param"] == "ttft_slo_s"
    assert [(r.tenant, r.priority, r.ttft_slo_s, r.cache_salt) for r in engines.requests] == [
        ("header", -2, 1.5, "header/s"),
        ("body", -2, 1.5, "s"),
        ("", 0, None, ""),
        ("t", 0, None, "t/"),
    ]


# -- models -----------------------------------------------------------------------------------------------------------


def test_serving_survives_the_catalog(client_of: Any, base: BaseModel, catalog: Catalog, tmp_path: Path) -> None:
    register(catalog, "tone", base.fingerprint)
    with client_of(ScriptedEngines(HELLO)) as client:
        catalog.close()
        for file in tmp_path.glob("catalog.db*"):
            file.write_bytes(b"not a database")
        assert client.complete(model="tone").status_code == 200
        assert error_of(client.complete(model="other"), 404)["code"]
        status = client.get("/status").json()
    assert (status["status"], status["catalog"]["num_adapters"]) == ("degraded", 1)
    assert status["catalog"]["failure"]


def test_models(client_of: Any, base: BaseModel, catalog: Catalog) -> None:
    register(catalog, "tone", base.fingerprint, context_length=1024)
    register(catalog, "tone", base.fingerprint, context_length=1024)
    register(catalog, "other", "f" * 64)
    catalog.aliases.move("tone", "prod", 1)
    with client_of(ScriptedEngines(HELLO), max_model_len=900) as client:
        card, tone = client.get("/v1/models").json()["data"]
        assert card | {"created": 0} == {
            "id": base.name,
            "object": "model",
            "created": 0,
            "owned_by": "loray",
            "root": base.name,
            "parent": None,
            "max_model_len": 512,
        }
        assert (tone["id"], tone["root"], tone["parent"], tone["max_model_len"]) == ("tone", "tone@1", base.name, 900)
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


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", ["complete", "chat"])
def test_unknown_model(client_of: Any, base: BaseModel, catalog: Catalog, ask: str, stream: bool) -> None:
    register(catalog, "tone", base.fingerprint)
    with client_of(ScriptedEngines(HELLO)) as client:
        for model in ("tome", "tone@7", "tone@canary", "tone@", "@1", "\u00e9"):
            error = error_of(getattr(client, ask)(model=model, stream=stream), 404)
            found = (error["code"], error["param"], error["type"])
            assert found == ("model_not_found", "model", "invalid_request_error")
            assert model in error["message"]
        if ask == "complete":  # it is resolved before the prompt is encoded
            assert error_of(client.complete(model="nobody", prompt=""), 404)["code"] == "model_not_found"


def test_adapters_that_a_client_loads_are_those_of_the_catalog(
    client_of: Any, base: BaseModel, catalog: Catalog
) -> None:
    register(catalog, "tone", base.fingerprint)
    with client_of(ScriptedEngines()) as client:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            response = client.post(path, json={"lora_name": "tone"})
            assert response.status_code == 200
            assert response.text.startswith("Success: LoRA adapter 'tone'")
            assert error_of(client.post(path, json={"lora_name": "nobody"}), 404)["code"] == "model_not_found"
            assert error_of(client.post(path, json={"lora_name": base.name}), 400)["param"] == "lora_name"
        body = {"lora_name": "tone", "lora_path": "tone", "load_inplace": True}
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
        error = error_of(client.post("/v1/load_lora_adapter", json=body | {"lora_path": "/models/tone"}), 400)
        assert "loray adapters import" in error["message"]


# -- status -----------------------------------------------------------------------------------------------------------


def test_health_and_status(client_of: Any, base: BaseModel) -> None:
    engines = ScriptedEngines()
    with client_of(engines, num_replicas=1) as client:
        assert client.get("/version").json() == {"version": __version__}
        assert client.get("/health").json() == {"status": "ok"}
        assert [client.get("/ping").status_code, client.post("/ping").status_code] == [200, 200]
        status = client.get("/status").json()
        assert (status["status"], status["totals"]["num_running"]) == ("ok", 1)
        (served,) = status["bases"]
        assert (served["base"], served["status"], served["num_replicas"], served["target"]) == (base.name, "ok", 1, 1)
        assert served["autoscaling"] is None
        assert status["replicas"][0]["adapters_in_pool"] == ["0" * 12]
        engines.replicas = []
        assert error_of(client.get("/health"), 503)["code"] == "engine_unavailable"
        assert [client.get("/ping").status_code, client.post("/ping").status_code] == [503, 503]
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


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_a_text_and_back(client_of: Any, base: BaseModel, catalog: Catalog) -> None:
    register(catalog, "tone", base.fingerprint, context_length=256)
    engines = ScriptedEngines(HELLO)
    with client_of(engines) as client:

        def tokens(**body: Any) -> Any:
            return client.post("/tokenize", json=body).json()

        def text(tokens: list[int]) -> Any:
            return client.post("/detokenize", json={"tokens": tokens}).json()

        body = tokens(model=base.name, prompt="aé")
        assert body == {"count": 3, "max_model_len": 512, "tokens": body["tokens"]}
        assert text(body["tokens"]) == {"prompt": "aé"}
        assert tokens(prompt="aé", return_token_strs=True)["token_strs"] == ["a", "Ã", "©"]
        assert tokens(prompt="")["tokens"] == []
        assert tokens(prompt="x" * 100_000)["count"] == 100_000  # to measure is allowed
        long = "naïve → " * 3000
        assert text(tokens(prompt=long)["tokens"]) == {"prompt": long}  # in pieces
        assert text([258]) == {"prompt": "<|im_end|>"}
        assert tokens(model="tone", prompt="a")["max_model_len"] == 256
        client.chat()
        assert tokens(messages=CHAT)["tokens"] == list(engines.requests[0].prompt_ids)
        assert error_of(client.post("/tokenize", json={"model": "nobody", "prompt": "a"}), 404)["param"] == "model"


def test_what_is_refused(client_of: Any) -> None:
    with client_of(ScriptedEngines()) as client:
        for path, body, param in [
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": "a", "messages": CHAT}, "prompt"),
            ("/tokenize", {"messages": []}, "messages"),
            ("/tokenize", {"prompt": [1]}, "prompt"),
            ("/detokenize", {"tokens": [259]}, "tokens"),
            ("/detokenize", {"tokens": [-1]}, "tokens"),
            ("/detokenize", {"tokens": "a"}, "tokens"),
            ("/v1/load_lora_adapter", {}, "lora_name"),
        ]:
            assert error_of(client.post(path, json=body), 400)["param"] == param, (path, body)


# -- tools ------------------------------------------------------------------------------------------------------------

SUM = [{"role": "user", "content": "1 + 2?"}]
ADD: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {}}}}}


def script(text: str, size: int = 3) -> Sequence[TokenDelta]:
    return [*(delta(text[i : i + size]) for i in range(0, len(text), size)), delta("", "stop")]


def prompt_of(engines: ScriptedEngines) -> str:
    return str(byte_tokenizer().decode(engines.requests[-1].prompt_ids))


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("pythonic", '[add(a=1), add(b=["ü", None])]'),
        (
            "qwen3_coder",
            "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>\n"
            '<tool_call>\n<function=add>\n<parameter=b>\n["ü", null]\n</parameter>\n</function>\n</tool_call>',
        ),
    ],
)
def test_calls_in_forms_that_are_not_json_are_json_for_clients(long_client_of: Any, form: str, text: str) -> None:
    script = [*map(delta, text), delta("", "stop")]
    with long_client_of(ScriptedEngines(script), tool_parser=form) as client:
        (choice,) = client.chat(messages=SUM, tools=[ADD]).json()["choices"]
        events = events_of(client.chat(messages=SUM, tools=[ADD], stream=True))[:-1]
    found = [json.loads(call["function"]["arguments"]) for call in choice["message"]["tool_calls"]]
    assert (found, choice["finish_reason"]) == ([{"a": 1}, {"b": ["ü", None]}], "tool_calls")
    streamed = ["", ""]
    for call in (call for e in events for call in e["choices"][0]["delta"].get("tool_calls", ())):
        streamed[call["index"]] += call["function"].get("arguments", "")
    assert [json.loads(arguments) for arguments in streamed] == found
    assert not any(e["choices"][0]["delta"].get("content") for e in events)


def test_without_tools_an_answer_is_text_and_the_model_is_not_told_of_them(long_client_of: Any) -> None:
    text = 'Well. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    engines = ScriptedEngines(script(text))
    with long_client_of(engines) as client:
        called, plain = (client.chat(messages=SUM, tools=[ADD], **fields) for fields in ({}, {"tool_choice": "none"}))
    (choice,), (other,) = called.json()["choices"], plain.json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Well.", "tool_calls")
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [{"name": "add", "arguments": '{"a": 1}'}]
    assert (other["message"]["content"], other["finish_reason"]) == (text, "stop")
    assert "<tools>" not in prompt_of(engines)


def test_what_the_model_is_shown_and_what_must_hold(long_client_of: Any) -> None:
    called = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    answered = {"role": "tool", "tool_call_id": "c1", "content": "3"}
    body: dict[str, Any] = {"messages": [*SUM, {"role": "assistant", "tool_calls": [called]}, answered], "tools": [ADD]}
    named = {"type": "function", "function": {"name": "add"}}
    engines = ScriptedEngines(script("3"))
    with long_client_of(engines) as client:
        for choice, is_held in (("auto", False), ("required", True), (named, True)):
            assert client.chat(**body, tool_choice=choice).status_code == 200
            assert (engines.requests[-1].params.structured is not None) == is_held
        shown = prompt_of(engines)
        client.chat(messages=[*SUM, {"role": "assistant", "content": "It is"}], continue_final_message=True)
        count = client.post("/tokenize", json={"model": client.base} | body).json()["count"]
    assert json.dumps(ADD) in shown
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in shown
    assert "<tool_response>\n3\n</tool_response>" in shown
    assert prompt_of(engines).endswith("assistant\nIt is")
    assert count == len(engines.requests[0].prompt_ids)


def test_an_adapter_speaks_as_it_was_trained(long_client_of: Any, long_base: BaseModel, catalog: Catalog) -> None:
    template = "{{ messages[-1].content }}|{{ tools | tojson }}|{{ mood }}"
    own = {"files": {"chat_template.jinja": hashlib.sha256(template.encode()).hexdigest()}, "chat_template": template}
    register(catalog, "tone", long_base.fingerprint, tool_parser="mistral", **own)
    engines = ScriptedEngines(script('[TOOL_CALLS]add[ARGS]{"a": 2}'))
    with long_client_of(engines) as client:
        asked = client.chat(model="tone", messages=SUM, tools=[ADD], chat_template_kwargs={"mood": "good"})
        message = asked.json()["choices"][0]["message"]
        assert prompt_of(engines) == f"1 + 2?|{json.dumps([ADD])}|good"
        assert message["content"] is None
        assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 2}'}
        client.chat(messages=SUM)
        assert prompt_of(engines).startswith("<|im_start|>user")


def test_a_response_format_holds_for_answers_without_calls(long_client_of: Any) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
    engines = ScriptedEngines(script("7"))
    with long_client_of(engines) as client:
        whole = client.chat(tools=[ADD], response_format=schema).json()
        assert whole["choices"][0]["message"]["content"] == "7"
        constraint = engines.requests[-1].params.structured
        assert constraint is not None
        assert '"type": "integer"' in constraint.text
        assert error_of(client.chat(tools=[ADD], guided_regex="a+"), 400)["param"] == "tools"
