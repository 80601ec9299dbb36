"""What the check of an API key costs a request: the middleware before an application that does nothing."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Mapping
from typing import Any, NamedTuple
from unittest.mock import Mock

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loray.catalog import Catalog
from loray.policy.auth import KeyRing
from loray.spec import DEFAULT_TENANT, KEY_START, PREFIX_LENGTH, ApiKey, HashedKey, KeyChanges, Tenant
from serve_apps.auth import Authenticate, Authenticator, Permissions
from serve_apps.catalog_watch import CatalogWatcher
from serve_apps.gateway import routes
from serve_apps.gateway.errors import failure_of, response_of

TARGET_US = 50.0
_NUM_KEYS = 10_000
_WRONG_PER_RIGHT = 4


class KeyCost(NamedTuple):
    """µs of processor time of one request, which others on the machine do not lengthen: over no check at all;
    `among_wrong`: a right one, where most others are wrong.
    """

    right: float
    wrong: float
    among_wrong: float

    @property
    def is_met(self) -> bool:
        return max(self.right, self.among_wrong) <= TARGET_US


class _Held(Authenticator):
    """Keys that are in memory and stay as they are."""

    async def refresh(self) -> None:
        pass


def measure(num_requests: int = 20_000) -> KeyCost:
    return asyncio.run(_measure(num_requests))


async def _measure(num_requests: int) -> KeyCost:
    ring, secret = _ring()

    def no_catalog() -> Catalog:
        raise AssertionError("a check needs no database")

    access = _Held(ring, CatalogWatcher(no_catalog), host="0.0.0.0")
    permissions = Permissions(routes.create_routes(Mock()))
    checked = Authenticate(_nothing, access, permissions, lambda e: response_of(failure_of(e)))
    right, wrong = _scope(secret), _scope(KEY_START + secrets.token_urlsafe(32))
    floor = await _seconds(_nothing, right, num_requests)
    of_right = await _seconds(checked, right, num_requests) - floor
    of_wrong = await _seconds(checked, wrong, num_requests) - floor
    mixed = 0.0
    for _ in range(num_requests // _WRONG_PER_RIGHT):
        for _ in range(_WRONG_PER_RIGHT):
            await checked({**wrong}, _receive, _send)
        began = time.thread_time()
        await checked({**right}, _receive, _send)
        mixed += time.thread_time() - began
    access.close()
    per = 1e6 / num_requests
    return KeyCost(of_right * per, of_wrong * per, mixed * per * _WRONG_PER_RIGHT)


def _ring() -> tuple[KeyRing, str]:
    tenant = Tenant.model_validate({"name": DEFAULT_TENANT, "created_at": "2026-01-01T00:00:00Z"})
    keys, secret = [], ""
    for number in range(_NUM_KEYS):
        secret = KEY_START + secrets.token_urlsafe(32)
        fields: Mapping[str, Any] = {
            "id": f"key-{number}",
            "prefix": secret[len(KEY_START) :][:PREFIX_LENGTH],
            "alias": f"key {number}",
            "tenant": tenant.name,
            "scopes": {"infer"},
            "created_by": "bench",
            "created_at": tenant.created_at,
        }
        keys.append(HashedKey(hashlib.sha256(secret.encode()).digest(), ApiKey.model_validate(fields)))
    changes = KeyChanges(1, tuple(keys), (tenant,), any_keys=True)
    return KeyRing().updated(changes, read_at=time.monotonic()), secret


def _scope(secret: str) -> dict[str, Any]:
    """Of a request as OpenAI's client sends it."""
    names = ("host", "connection", "accept", "accept-encoding", "user-agent", "x-stainless-lang", "content-length")
    headers = [(name.encode(), b"some text of usual length") for name in names]
    headers += [(b"content-type", b"application/json"), (b"authorization", f"Bearer {secret}".encode())]
    return {"type": "http", "method": "POST", "path": "/v1/chat/completions", "root_path": "", "headers": headers}


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    pass


async def _receive() -> Message:
    raise AssertionError("no body is read before the key is checked")


async def _send(message: Message) -> None:
    pass


async def _seconds(app: ASGIApp, scope: Mapping[str, Any], num_requests: int) -> float:
    began = time.thread_time()
    for _ in range(num_requests):
        await app({**scope}, _receive, _send)
    return time.thread_time() - began


def line(cost: KeyCost) -> str:
    return (
        f"key check of {_NUM_KEYS:,} keys: {cost.right:.1f} µs a request with a right one, {cost.wrong:.1f} µs with a "
        f"wrong one, {cost.among_wrong:.1f} µs with a right one among {_WRONG_PER_RIGHT} wrong ones each; ≤ "
        f"{TARGET_US:g} µs: {'met' if cost.is_met else 'MISSED'}"
    )
