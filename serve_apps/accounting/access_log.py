"""The access log: one JSON object a line for each HTTP request. No prompts, answers, keys or queries."""

from __future__ import annotations

import atexit
import json
import queue
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loray.spec import Principal, UsageEvent
from loray.telemetry import get_logger
from loray.variables import STDOUT
from serve_apps.http import CLIENT_LEFT

_log = get_logger(__name__)

_MAX_QUEUED = 10_000
_MAX_PATH = 200


class AccessLog:
    """Writes lines from a thread, to a file or to stdout. A file that is rotated away is made anew."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._queue: queue.Queue[str | None] = queue.Queue(_MAX_QUEUED)
        self._num_lost = 0
        self._thread = Thread(target=self._write_all, name="access-log", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def add(self, fields: dict[str, Any]) -> None:
        """Take a line at once. One that the target has no time for is lost, and counted in the next one."""
        if self._num_lost:
            fields = fields | {"lost_before": self._num_lost}
        try:
            self._queue.put_nowait(json.dumps(fields, separators=(",", ":")) + "\n")
            self._num_lost = 0
        except queue.Full:
            self._num_lost += 1

    def close(self) -> None:
        """Write what is left."""
        atexit.unregister(self.close)
        self._queue.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        running = True
        while running:
            batch = [self._queue.get()]
            with suppress(queue.Empty):
                while True:
                    batch.append(self._queue.get_nowait())
            running = None not in batch
            try:
                self._write("".join(line for line in batch if line is not None))
            except OSError as e:
                _log.error("the access log cannot be written to %s: %s", self._target, e)

    def _write(self, lines: str) -> None:
        if self._target == STDOUT:
            sys.stdout.write(lines)
            sys.stdout.flush()
            return
        with Path(self._target).open("a", encoding="utf-8") as f:
            f.write(lines)


class LogAccess:
    """ASGI middleware, in front of all others: it also logs requests that they refuse."""

    def __init__(self, app: ASGIApp, log: AccessLog) -> None:
        self._app, self._log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, request_id = time.monotonic(), CLIENT_LEFT, None
        state = scope.setdefault("state", {})

        async def watched(message: Message) -> None:
            nonlocal status, request_id
            if message["type"] == "http.response.start":
                status = message["status"]
                request_id = Headers(raw=message["headers"]).get("x-request-id")
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            fields = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"][:_MAX_PATH],
                "status": status,
                "seconds": round(time.monotonic() - started, 6),
            }
            self._log.add(fields | _who(state.get("principal")) | _what(state.get("usage")))


def _who(principal: Principal | None) -> dict[str, Any]:
    return {} if principal is None else {"tenant": principal.tenant, "key_id": principal.key_id}


def _what(event: UsageEvent | None) -> dict[str, Any]:
    if event is None:
        return {}
    fields = ("model", "digest", "num_prompt_tokens", "num_cached_tokens", "num_output_tokens", "outcome")
    return {"usage_id": event.request_id} | {field: getattr(event, field) for field in fields}


def log_access(app: FastAPI, target: str | None) -> FastAPI:
    """`target` None: there is no access log."""
    if target is not None:
        app.add_middleware(LogAccess, log=AccessLog(target))
    return app
