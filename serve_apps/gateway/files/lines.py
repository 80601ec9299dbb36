"""Lines of batches: a gateway answers each as the request that its key would send, behind those of all people."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message

from loray.errors import LorayError, PermissionDenied, Unauthenticated
from loray.policy.quotas import LIMIT, SHOULD_RETRY
from loray.schemas.status import ReplicaStatus
from serve_apps.auth import AS_BATCH, Authenticator
from serve_apps.batches.lines import BaseLoad, LineAnswer, Refusal
from serve_apps.gateway.errors import failure_of
from serve_apps.gateway.gateway import Gateway

_RETRIED = (429, 503)
_CROWDED_S = 1.0  # that a request waits at least where some wait for their turn in the gateway


class BatchLines:
    """Implements `serve_apps.batches.lines.GatewayLines` in a gateway's process: a line passes through the whole
    application, so that limits, usage, metrics and logs are those of any request.
    """

    def __init__(self, app: ASGIApp, gateway: Gateway, access: Authenticator) -> None:
        self._app, self._gateway, self._access = app, gateway, access

    async def run_line(self, key_id: str | None, tenant: str, endpoint: str, body: bytes) -> LineAnswer:
        try:
            principal = await self._access.of_account(key_id, tenant)
        except LorayError as e:
            failure = failure_of(e)
            refusal: Refusal = "away"
            if isinstance(e, Unauthenticated):
                refusal = "revoked"
            elif isinstance(e, PermissionDenied):
                refusal = "blocked"
            return LineAnswer(failure.status, failure.body, refusal=refusal, retry_after_s=e.retry_after_s or 30.0)
        asked: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[Message] = []

        async def receive() -> Message:
            if asked:
                return asked.pop()
            await asyncio.Event().wait()  # it never leaves; whoever cancels this line cancels its request
            raise AssertionError

        async def send(message: Message) -> None:
            sent.append(message)

        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": endpoint,
            "raw_path": endpoint.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": None,
            "server": None,
            "state": {AS_BATCH: principal},
        }
        try:
            await self._app(scope, receive, send)
        except Exception:
            if not sent:
                raise
        status, headers = sent[0]["status"], Headers(raw=sent[0]["headers"])
        text = b"".join(message.get("body", b"") for message in sent[1:]).decode()
        retry_after_s = float(headers.get("retry-after-ms", 1000)) / 1000
        return LineAnswer(status, text, headers.get("x-request-id"), _refusal(status, headers), retry_after_s)

    async def bases_of(self, key_id: str | None, tenant: str, models: Collection[str]) -> Mapping[str, str | None]:
        try:
            principal = await self._access.of_account(key_id, tenant)
        except (Unauthenticated, PermissionDenied):  # as the first line will hear
            return dict.fromkeys(models)
        return {model: self._gateway.directory.known_base(model, principal) for model in models}

    async def loads(self) -> Mapping[str, BaseLoad]:
        crowded_s = _CROWDED_S if self._gateway.turns.num_waiting else 0.0
        engines = {name: base.engines for name, base in self._gateway.bases.items()}
        stats = await asyncio.gather(*(engine.stats() for engine in engines.values()))
        return {
            name: _load(replicas, crowded_s, is_cold=engine.is_cold())
            for (name, engine), replicas in zip(engines.items(), stats, strict=True)
        }


def _refusal(status: int, headers: Mapping[str, str]) -> Refusal | None:
    if status == 401:
        return "revoked"
    kind = headers.get(LIMIT)
    if status not in _RETRIED or (kind != "budget" and headers.get(SHOULD_RETRY) == "false"):
        return None
    if status == 503:
        return "away"
    return "overloaded" if kind is None else "budget" if kind == "budget" else "limit"


def _load(replicas: Sequence[ReplicaStatus], wait_s: float, *, is_cold: bool) -> BaseLoad:
    return BaseLoad(max([wait_s, *(replica.longest_wait_s for replica in replicas)]), is_cold)
