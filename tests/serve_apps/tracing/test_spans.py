"""Spans of requests from the client's trace to the engine's phases, and what is not in them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.engine.async_engine import AsyncEngine
from loray.engine.build import build_engine
from loray.publishing import Destination, publish
from loray.settings import Settings
from loray.spec import ServeSpec
from loray.store import AdapterStore, open_store
from serve_apps.replica.startup import adapter_loader
from tests.fixtures.channel import until
from tests.serve_apps.tracing.places import Deployed, Place, data_plane, serve

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = (f"00-{TRACE}-{PARENT}-{flags}" for flags in ("01", "00"))
SECRET = "zebra"
PLACES = pytest.mark.parametrize("place", [serve, data_plane])


@pytest.fixture(scope="module")
def made(
    tiny_base: Callable[..., BaseModel],
    peft_folder: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[ServeSpec, Settings, AsyncEngine]]:
    base = tiny_base()
    home = tmp_path_factory.mktemp("home")
    (home / "bases").symlink_to(base.path.parent)
    settings = Settings.from_env({"LORAY_HOME": str(home)})
    store, catalog = AdapterStore(open_store(settings.store)), Catalog(settings.catalog)
    publish(peft_folder(base), base, Destination("tone", store, catalog))
    catalog.close()
    spec = ServeSpec(base=base.name, dtype="float32", pool_bytes=4 << 20)
    stream = AsyncEngine(build_engine(spec, base, adapter_loader(base, settings)))
    stream.start()
    yield spec, settings, stream
    stream.stop()


@pytest.fixture
def deployed(made: tuple[ServeSpec, Settings, AsyncEngine]) -> Deployed:
    return Deployed(*made)


def ask(place: Place, deployed: Deployed, path: str, body: dict[str, Any], num_spans: int, **headers: str) -> Any:
    """The response, once so many spans have ended."""

    async def story() -> httpx.Response:
        async with place(deployed) as client:
            response: httpx.Response = await client.post(path, json=body, headers=headers)
            await until(lambda: sum(map(len, deployed.spans.values())) >= num_spans)
            return response

    return asyncio.run(story())


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def parent(span: ReadableSpan) -> str:
    return "" if span.parent is None else f"{span.parent.span_id:016x}"


def own(span: ReadableSpan) -> str:
    assert f"{span.context.trace_id:032x}" == TRACE
    return f"{span.context.span_id:016x}"


@PLACES
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_trace_from_the_client_to_the_engine(place: Place, stream: bool, deployed: Deployed) -> None:
    body = {"model": "tone", "prompt": SECRET, "max_tokens": 4, "n": 2, "stop": ["ostrich"], "ignore_eos": True}
    headers = {"traceparent": SAMPLED, "X-Request-Id": "mine"}
    response = ask(place, deployed, "/v1/completions", body | {"stream": stream}, 9, **headers)
    assert response.status_code == 200, response.text
    spans = deployed.spans
    (gateway,) = spans["text_completion tone"]
    assert parent(gateway) == PARENT
    found = attributes(gateway)
    expected: dict[str, Any] = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "tone",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stream": stream,
        "gen_ai.response.model": "tone@1",
        "gen_ai.usage.output_tokens": 8,
        "http.response.status_code": 200,
        "loray.request_id": "mine",
    }
    assert expected.items() <= found.items()
    if not stream:
        usage = response.json()["usage"]
        assert found["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
        assert found["gen_ai.response.id"] == response.json()["id"]
    assert len(spans["generate"]) == 2
    for choice in spans["generate"]:
        assert parent(choice) == own(gateway)
        within = {name: [s for s in spans[name] if parent(s) == own(choice)] for name in ("queue", "prefill", "decode")}
        (queue,), (prefill,), (decode,) = within.values()
        assert choice.start_time == queue.start_time
        assert (queue.end_time, prefill.end_time) == (prefill.start_time, decode.start_time)
        assert queue.start_time <= prefill.start_time <= decode.start_time <= decode.end_time <= choice.end_time
        about = attributes(choice)
        assert about["gen_ai.usage.output_tokens"] == 4
        assert about["gen_ai.response.finish_reasons"] == ("length",)
        assert about["gen_ai.request.model"] == "tone@1"
        ids = {attributes(span)["loray.request_id"] for span in (choice, queue, prefill, decode)}
        assert len(ids) == 1
        assert ids.pop().startswith(f"mine-{found['gen_ai.response.id']}-")


@PLACES
def test_no_text_is_in_a_span(place: Place, deployed: Deployed) -> None:
    tool = {"type": "function", "function": {"name": "gazelle", "parameters": {"type": "object"}}}
    body = {
        "model": "tone",
        "messages": [{"role": "user", "content": SECRET}],
        "max_tokens": 3,
        "stop": ["ostrich"],
        "user": "giraffe",
        "tools": [tool],
        "tool_choice": "none",
    }
    response = ask(place, deployed, "/v1/chat/completions", body, 5, traceparent=SAMPLED)
    assert response.status_code == 200, response.text
    text = "".join(str(span.to_json()) for spans in deployed.spans.values() for span in spans)
    answer = json.loads(response.text)["choices"][0]["message"]["content"]
    assert [word for word in (SECRET, "ostrich", "giraffe", "gazelle", answer) if word and word in text] == []
    assert "chat tone" in deployed.spans


def test_a_request_that_is_refused_has_the_gateway_s_span_alone(deployed: Deployed) -> None:
    body = {"model": "none-of-this-name", "prompt": "x"}
    assert ask(serve, deployed, "/v1/completions", body, 1, traceparent=SAMPLED).status_code == 404
    ((name, (span,)),) = deployed.spans.items()
    assert (name, span.status.is_unset) == ("text_completion", True)
    assert attributes(span)["error.type"] == "404"
    assert "none-of-this-name" not in str(span.to_json())


@PLACES
def test_a_trace_that_the_client_does_not_sample_has_no_spans(place: Place, deployed: Deployed) -> None:
    body = {"model": "tone", "prompt": "x", "max_tokens": 1}
    assert ask(place, deployed, "/v1/completions", body, 0, traceparent=UNSAMPLED).status_code == 200
    assert deployed.spans == {}


@pytest.mark.parametrize("headers", [{}, {"traceparent": "00-nonsense"}])
def test_without_a_client_s_trace_a_new_one_begins(headers: dict[str, str], deployed: Deployed) -> None:
    body = {"model": deployed.spec.base, "prompt": "x", "max_tokens": 1}
    assert ask(serve, deployed, "/v1/completions", body, 5, **headers).status_code == 200
    (gateway,) = deployed.spans[f"text_completion {deployed.spec.base}"]
    assert gateway.parent is None
    assert {span.context.trace_id for spans in deployed.spans.values() for span in spans} == {gateway.context.trace_id}
    assert "gen_ai.response.model" not in attributes(gateway)


def test_other_routes_have_no_spans(deployed: Deployed) -> None:
    assert ask(serve, deployed, "/tokenize", {"model": "tone", "prompt": "x"}, 0).status_code == 200
    assert deployed.spans == {}
