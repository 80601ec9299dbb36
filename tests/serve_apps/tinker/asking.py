"""Clients of a front in this process, each with a key of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from loray.bases.registry import BaseModel
from loray.schemas.tinker.proto import ForwardBackwardOutput, SampleResponse
from loray.spec import Principal
from serve_apps.tinker.app import create_app
from tests.fixtures.keys import Given
from tests.fixtures.tinker import Unigram, pass_body, unigram

TOKENS = [5, 6, 7, 8, 6, 7]
ROW = {"tokens": TOKENS[:-1], "target_tokens": TOKENS[1:]}
JSON = {"Content-Type": "application/json"}
PROTOBUF = {"Content-Type": "application/x-protobuf"}


@dataclass
class Client:
    """Asks as the SDK does, with a number for each request of its model."""

    http: httpx.AsyncClient
    session: str = ""
    model: str = ""
    seq: int = 0

    async def post(self, path: str, body: Mapping[str, Any] | bytes) -> httpx.Response:
        if isinstance(body, bytes):
            return await self.http.post(f"/api/v1/{path}", content=body, headers=PROTOBUF)
        return await self.http.post(f"/api/v1/{path}", json=body, headers=JSON)

    async def ask(self, path: str, body: Mapping[str, Any] | bytes) -> dict[str, Any]:
        response = await self.post(path, body)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    async def result(self, request: Mapping[str, Any]) -> httpx.Response:
        return await self.post("retrieve_future", {"request_id": request["request_id"]})

    async def done(self, path: str, body: Mapping[str, Any] | bytes) -> dict[str, Any]:
        """Send a request, and return its result."""
        response = await self.result(await self.ask(path, body))
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    async def open(self) -> None:
        """Begin a session."""
        made = await self.ask("create_session", {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0"})
        self.session = made["session_id"]

    async def begin(self, **fields: Any) -> None:
        """Begin a session with a model."""
        await self.open()
        self.model = (await self.create(0, **fields))["model_id"]

    async def create(self, number: int, **fields: Any) -> dict[str, Any]:
        body = {"session_id": self.session, "model_seq_id": number, "base_model": "base", "lora_config": {"rank": 8}}
        return await self.done("create_model", body | fields)

    def next(self, **fields: Any) -> dict[str, Any]:
        self.seq += 1
        return {"model_id": self.model, "seq_id": self.seq, **fields}

    async def forward_backward(self, **options: Any) -> Any:
        self.seq += 1
        request = await self.ask("forward_backward", pass_body(self.model, self.seq, ROW, **options))
        response = await self.result(request)
        assert response.headers["content-type"] == "application/x-protobuf", response.text
        return ForwardBackwardOutput.FromString(response.content)

    async def step(self, rate: float = 0.02) -> dict[str, Any]:
        return await self.done("optim_step", self.next(adam_params={"learning_rate": rate}))

    async def sample(self, sampler: str, seq: int = 0, **fields: Any) -> Any:
        body = {"sampling_session_id": sampler, "seq_id": seq, "prompt": {"chunks": [{"tokens": TOKENS}]}, **fields}
        response = await self.result(await self.ask("asample", body))
        assert response.headers["content-type"] == "application/x-protobuf", response.text
        return SampleResponse.FromString(response.content)


@asynccontextmanager
async def asking(of: Unigram, principal: Principal | None = None) -> AsyncIterator[Client]:
    """A client of the front, of the tenant `acme`."""
    app = create_app(of.front, Given(principal or Principal(tenant="acme", key_id="key-1")))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield Client(http)


def fronted(base: BaseModel, catalog_url: str) -> Unigram:
    """The front of a base that clients call `base`."""
    return unigram(base, catalog_url, {"base": base.name})
