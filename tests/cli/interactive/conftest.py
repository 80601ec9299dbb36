"""A server that answers in this process, for commands that ask one."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest

from loray.client import LorayClient
from loray.schemas.openai import ChatFormat, Error, ErrorBody, Usage
from loray.schemas.status import BaseStatus, CatalogStatus, EngineStatus, ReplicaStatus, Status
from loray.spec import ServeSpec
from tests.fixtures.answers import delta, fmt

MODELS = ("tiny", "tone", "dates")


class Server:
    """`asked`: the bodies of chats. Each look at /status is 100 output tokens later."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.looks = 0
        self.refuses_metrics = False

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")
            if name not in MODELS:
                body = ErrorBody(error=Error(message=f"no model {name!r}", type="t", code="model_not_found"))
                return httpx.Response(404, text=body.to_json())
            model = {"id": name, "object": "model", "created": 0, "owned_by": "loray", "root": name}
            return httpx.Response(200, json=model | {"max_model_len": 64})
        if path == "/v1/chat/completions":
            return self._chat(json.loads(request.content))
        if path == "/status":
            self.looks += 1
            return httpx.Response(200, text=self._status().model_dump_json())
        if path == "/metrics" and not self.refuses_metrics:
            return httpx.Response(200, text=self._metrics())
        return httpx.Response(403, text=ErrorBody(error=Error(message="not this key", type="t")).to_json())

    def _chat(self, body: dict[str, Any]) -> httpx.Response:
        self.asked.append(body)
        made = fmt(ChatFormat)
        said = f"{body['model']} hears {body['messages'][-1]['content']}"
        if said.endswith("fail"):
            error = ErrorBody(error=Error(message="it broke", type="server_error")).to_json()
            return httpx.Response(500, text=error)
        chunks = [made.opening(0), *(made.chunk(0, delta(word, None)) for word in said.split(" "))]
        chunks += [made.chunk(0, delta("", None, "stop")), made.usage_chunk(Usage.of(3, 5))]
        events = [chunk.to_json() for chunk in chunks]
        text = "".join(f"data: {data}\n\n" for data in (*events, "[DONE]"))
        return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})

    def _status(self) -> Status:
        replicas = tuple(
            ReplicaStatus(
                replica=name,
                node="n",
                pid=1,
                uptime_s=9.0,
                num_running=2,
                num_waiting=3,
                num_output_tokens=100 * self.looks,
                blocks={"free": 1, "kv": 3},
                adapters_in_pool=in_pool,
                adapters_on_host=("tone@1", "dates@2"),
            )
            for name, in_pool in (("r1", ("tone@1",)), ("r2", ("tone@1", "dates@2")))
        )
        catalog = CatalogStatus(num_adapters=2)
        tiny = BaseStatus(
            base="tiny", status="ok", num_replicas=2, target=2, num_adapters=2, spec=ServeSpec(base="tiny")
        )
        return Status(status="ok", bases=(tiny,), catalog=catalog, replicas=replicas, totals=EngineStatus())

    def _metrics(self) -> str:
        name = "loray_time_to_first_token_seconds"
        lines = [f"# TYPE {name} histogram"]
        for bound, count in (("0.1", 5), ("1.0", 10), ("+Inf", 10)):
            lines.append(f'{name}_bucket{{replica="r1",method="lora",le="{bound}"}} {count * self.looks}')
        lines += ["# TYPE loray_http_requests_total counter"]
        lines += [f'loray_http_requests_total{{gateway="g1",route="/v1",code="200"}} {10 * self.looks}']
        lines += ["# TYPE loray_http_requests_in_flight gauge", 'loray_http_requests_in_flight{gateway="g1"} 4']
        return "\n".join(lines) + "\n"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """Its URL is LORAY_URL."""
    made = Server()
    monkeypatch.setenv("LORAY_URL", "http://test")
    client: Callable[..., LorayClient] = partial(LorayClient, transport=httpx.MockTransport(made))
    for module in ("chat", "top"):
        monkeypatch.setattr(f"loray.cli.{module}.LorayClient", client)
    return made
