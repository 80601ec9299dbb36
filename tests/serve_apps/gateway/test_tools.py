"""Tools through the gateway on scripted engines: what the model is shown, what must hold of its answer, what the client
gets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.spec import TokenDelta
from tests.fixtures.tiny import byte_tokenizer
from tests.serve_apps.gateway.scripted import ScriptedEngines, delta, register
from tests.serve_apps.gateway.test_gateway import error_of, events_of

CHAT = [{"role": "user", "content": "1 + 2?"}]
ADD: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {}}}}}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base(max_position_embeddings=4096)


def script(text: str, size: int = 3) -> Sequence[TokenDelta]:
    return [*(delta(text[i : i + size]) for i in range(0, len(text), size)), delta("", "stop")]


def prompt_of(engines: ScriptedEngines) -> str:
    return str(byte_tokenizer().decode(engines.requests[-1].prompt_ids))


def test_calls_in_an_answer_and_in_a_stream(client_of: Any, base: BaseModel) -> None:
    body = {"model": base.name, "messages": CHAT, "tools": [ADD]}
    engines = ScriptedEngines(script(f"Well. {CALL}"))
    with client_of(engines) as client:
        choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
        events = events_of(client.post("/v1/chat/completions", json=body | {"stream": True}))
        plain = client.post("/v1/chat/completions", json=body | {"tool_choice": "none"}).json()["choices"][0]
    message = choice["message"]
    assert (message["content"], choice["finish_reason"]) == ("Well.", "tool_calls")
    (call,) = message["tool_calls"]
    assert call == {"id": call["id"], "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    *chunks, done = (event if event == "[DONE]" else event["choices"][0] for event in events)
    assert done == "[DONE]"
    assert "".join(c["delta"].get("content", "") for c in chunks) == "Well."
    streamed = [d for c in chunks for d in c["delta"].get("tool_calls", ())]
    assert streamed[0] | {"id": ""} == {
        "index": 0,
        "id": "",
        "type": "function",
        "function": {"name": "add", "arguments": streamed[0]["function"]["arguments"]},
    }
    assert "".join(d["function"]["arguments"] for d in streamed) == '{"a": 1}'
    assert chunks[-1]["finish_reason"] == "tool_calls"
    # Without tools the answer is text, and the model is not told of them.
    assert (plain["message"]["content"], plain["finish_reason"]) == (f"Well. {CALL}", "stop")
    assert "<tools>" not in prompt_of(engines)


def test_what_the_model_is_shown_and_what_must_hold(client_of: Any, base: BaseModel) -> None:
    called = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    messages = [
        *CHAT,
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    body: dict[str, Any] = {"model": base.name, "messages": messages, "tools": [ADD]}
    engines = ScriptedEngines(script("3"))
    with client_of(engines) as client:
        for choice, is_held in (
            ("auto", False),
            ("required", True),
            ({"type": "function", "function": {"name": "add"}}, True),
        ):
            assert client.post("/v1/chat/completions", json=body | {"tool_choice": choice}).status_code == 200
            assert (engines.requests[-1].params.structured is not None) == is_held
        shown = prompt_of(engines)
        prefill = [*CHAT, {"role": "assistant", "content": "It is"}]
        client.post(
            "/v1/chat/completions", json={"model": base.name, "messages": prefill, "continue_final_message": True}
        )
        count = client.post("/tokenize", json={"model": base.name, "messages": messages, "tools": [ADD]}).json()[
            "count"
        ]
    assert json.dumps(ADD) in shown
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in shown
    assert "<tool_response>\n3\n</tool_response>" in shown
    assert prompt_of(engines).endswith("assistant\nIt is")
    assert count == len(engines.requests[0].prompt_ids)


def test_an_adapter_speaks_as_it_was_trained(client_of: Any, base: BaseModel, catalog: Catalog) -> None:
    template = "{{ messages[-1].content }}|{{ tools | tojson }}|{{ mood }}"
    own = {"files": {"chat_template.jinja": hashlib.sha256(template.encode()).hexdigest()}, "chat_template": template}
    register(catalog, "tone", base.fingerprint, tool_parser="mistral", **own)
    engines = ScriptedEngines(script('[TOOL_CALLS]add[ARGS]{"a": 2}'))
    body = {"model": "tone", "messages": CHAT, "tools": [ADD], "chat_template_kwargs": {"mood": "good"}}
    with client_of(engines) as client:
        message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        assert prompt_of(engines) == f"1 + 2?|{json.dumps([ADD])}|good"
        assert message["content"] is None
        assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 2}'}
        client.post("/v1/chat/completions", json={"model": base.name, "messages": CHAT})
        assert prompt_of(engines).startswith("<|im_start|>user")


def test_a_response_format_holds_for_answers_without_calls(client_of: Any, base: BaseModel) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
    body = {"model": base.name, "messages": CHAT, "tools": [ADD]}
    engines = ScriptedEngines(script("7"))
    with client_of(engines) as client:
        whole = client.post("/v1/chat/completions", json=body | {"response_format": schema}).json()
        assert whole["choices"][0]["message"]["content"] == "7"
        constraint = engines.requests[-1].params.structured
        assert constraint is not None
        assert '"type": "integer"' in constraint.text
        refused = client.post("/v1/chat/completions", json=body | {"guided_regex": "a+"})
        assert error_of(refused, 400)["param"] == "tools"
