"""The response to a generation request: it runs the choices, writes what they bring, and ends them with the client."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import NamedTuple, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loray.errors import DeadlineExceeded, KeyRevoked
from loray.spec import Delta, TokenDelta
from serve_apps.accounting.accounts import RequestUsage
from serve_apps.gateway import errors
from serve_apps.gateway.answers.writers import AnswerWriter
from serve_apps.gateway.canaries import CanaryMeter

OUT_OF_QUOTA = "quota"  # the stop reason of an answer that a limit of tokens ended
_SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientConnection:
    """Sends one response. Several tasks may write: each text is one message, which goes out whole after the start.

    heartbeat_s  after which a silent stream gets `heartbeat`; None: never
    """

    def __init__(
        self, send: Send, headers: Sequence[tuple[bytes, bytes]], heartbeat: str, heartbeat_s: float | None
    ) -> None:
        self._send, self._headers = send, headers
        self._heartbeat, self._heartbeat_s = heartbeat, heartbeat_s
        self._starting = asyncio.Lock()
        self._is_sent = False  # the status, which texts may follow
        self._time = asyncio.get_running_loop().time
        self._written_at = self._time()
        self.started = False  # the status has been sent, or is being sent
        self.is_blocked = False  # a write waits until the client reads, or was cancelled while it did

    async def write(self, text: str) -> None:
        self.is_blocked = True
        if not self._is_sent:
            await self._start(self._headers)
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        self.is_blocked = False
        self._written_at = self._time()

    async def end(self, text: str) -> None:
        body = text.encode()
        self.is_blocked = True
        if not self._is_sent:
            await self._start([*self._headers, (b"content-length", str(len(body)).encode())])
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
        self.is_blocked = False

    async def until_left(self, receive: Receive) -> None:
        """Return when the client has disconnected. Writes the heart-beats meanwhile."""
        while True:
            due = None if self._heartbeat_s is None else self._written_at + self._heartbeat_s
            try:
                async with asyncio.timeout_at(due):
                    while (await receive())["type"] != "http.disconnect":
                        pass
                return
            except TimeoutError:
                if self.is_blocked:
                    self._written_at = self._time()  # the client has something to read
                elif self._heartbeat_s is not None and self._time() >= self._written_at + self._heartbeat_s:
                    await self.write(self._heartbeat)

    async def _start(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        async with self._starting:
            if not self.started:
                self.started = True
                await self._send({"type": "http.response.start", "status": 200, "headers": list(headers)})
                self._is_sent = True


class DeltaText(Protocol):
    """Writes the text of one choice."""

    def push(self, tokens: TokenDelta, /) -> Delta: ...


class ChoiceStream(NamedTuple):
    """One choice: its tokens, and what makes text of them. Closing `tokens` cancels the request in the engine."""

    tokens: AsyncGenerator[TokenDelta, None]
    text: DeltaText


class Deadline(NamedTuple):
    """`at` is a time of the event loop, `timeout_s` after the request came."""

    at: float
    timeout_s: float

    @classmethod
    def earliest(cls, received_at: float, *timeouts_s: float | None) -> Deadline | None:
        """Make the deadline after the shortest of these; None: there is none."""
        limits = [s for s in timeouts_s if s is not None]
        return cls(received_at + min(limits), min(limits)) if limits else None


class AnswerResponse(Response):
    """The response to a generation request. An ASGI application, which has no task for each token.

    Nothing is sent before the first event or heart-beat, so that an error until then has its own status; a later one
    is the last event. The choices end, and their streams are closed at once, if one fails, the client disconnects, its
    key is revoked, or the deadline passes.
    """

    def __init__(
        self,
        choices: Sequence[ChoiceStream],
        writer: AnswerWriter,
        *,
        request_id: str,
        account: RequestUsage | None = None,
        deadline: Deadline | None = None,
        heartbeat_s: float | None = None,
        headers: Mapping[str, str] | None = None,
        meter: CanaryMeter | None = None,
    ) -> None:
        self.status_code, self.media_type, self.background = 200, writer.media_type, None
        self._limits = {} if account is None else account.headers
        self._own = {"X-Request-Id": request_id, **self._limits, **(headers or {})}
        self.init_headers({**self._own, **(_SSE_HEADERS if writer.heartbeat else {})})
        self._choices, self._writer, self._account = choices, writer, account
        self._last: list[Delta | None] = [None] * len(choices)
        self._request_id, self._deadline, self._meter = request_id, deadline, meter
        self._heartbeat_s = heartbeat_s if writer.heartbeat else None
        self._is_broken = False  # it had begun, and has no end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = "cancelled"
        try:
            outcome = await self._answer(scope, receive, send)
        finally:
            if self._is_broken:
                scope.setdefault("state", {})["is_broken"] = True  # for the metrics
            if self._meter is not None:
                self._meter.end(outcome, self._last[0])
            if self._account is not None:
                scope.setdefault("state", {})["usage"] = self._account.close(outcome, self._last)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> str:
        """Return the outcome, as `UsageEvent` has it."""
        connection = ClientConnection(send, self.raw_headers, self._writer.heartbeat, self._heartbeat_s)
        limit = asyncio.timeout_at(self._deadline and self._deadline.at)
        left = False
        revoked: asyncio.Future[None] | None = scope.get("state", {}).get("revoked")

        def end_now(_: object = None) -> None:
            if not limit.expired():
                limit.reschedule(0)  # ends the block below now

        async def watch() -> None:
            nonlocal left
            if revoked is not None:
                revoked.add_done_callback(end_now)
            await connection.until_left(receive)
            left = True
            end_now()

        try:
            async with limit:
                watcher = asyncio.create_task(watch())
                try:
                    await self._run(connection)
                    await connection.end(self._writer.end())
                    return "ok"
                finally:
                    watcher.cancel()
                    if revoked is not None:
                        revoked.remove_done_callback(end_now)
        except Exception as e:  # noqa: BLE001 - failure_of logs unexpected errors; the client gets a reason
            if left:
                return "disconnected"
            error = e
            if limit.expired():
                is_revoked = revoked is not None and revoked.done()
                if connection.is_blocked:
                    # The client does not read; without an end of the response, the server closes.
                    self._is_broken = True
                    return "key_revoked" if is_revoked else "deadline_exceeded"
                if is_revoked:
                    error = KeyRevoked("the API key was revoked or blocked while this was answered")
                else:
                    assert self._deadline is not None
                    error = DeadlineExceeded(f"the request took longer than {self._deadline.timeout_s:g} s, its limit")
            return await self._fail(error, connection, scope, receive, send)

    async def _run(self, connection: ClientConnection) -> None:
        # In tasks, also a single one: a token then wakes the choice alone, and not the routes and middleware around it.
        if len(self._choices) == 1:
            await asyncio.create_task(self._pump(0, connection))
            return
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(len(self._choices)):
                    group.create_task(self._pump(index, connection))
        except ExceptionGroup as e:
            raise e.exceptions[0] from None  # the first error; it ended the others

    async def _pump(self, index: int, connection: ClientConnection) -> None:
        stream, text = self._choices[index]
        push = self._writer.push
        meter, account = self._meter if index == 0 else None, self._account
        num_tokens, asked_at = 0, sys.maxsize if account is None else 0
        async with aclosing(stream):
            async for tokens in stream:
                if meter is not None:
                    meter.came()
                num_tokens += len(tokens.token_ids)
                if num_tokens < asked_at:
                    delta = text.push(tokens)
                else:
                    delta, asked_at = self._metered(index, tokens, num_tokens)
                self._last[index] = delta
                if written := push(index, delta):
                    await connection.write(written)
                if delta.finish_reason is not None:
                    return

    def _metered(self, index: int, tokens: TokenDelta, num_tokens: int) -> tuple[Delta, int]:
        """The delta, the last one where the account has no more, and the number of tokens at which it is asked next."""
        _, text = self._choices[index]
        if tokens.finish_reason is not None or self._account is None:
            return text.push(tokens), sys.maxsize
        asked_at = self._account.asked_again_at(index, num_tokens)
        if asked_at > num_tokens:
            return text.push(tokens), asked_at
        delta = text.push(tokens._replace(finish_reason="length"))
        return delta._replace(stop_reason=OUT_OF_QUOTA) if delta.finish_reason == "length" else delta, asked_at

    async def _fail(
        self, error: Exception, connection: ClientConnection, scope: Scope, receive: Receive, send: Send
    ) -> str:
        failure = errors.failure_of(error, self._request_id)
        if self._meter is not None:
            self._meter.failed(error, failure.status)
        if connection.started:
            self._is_broken = True
            await connection.end(self._writer.failed(failure))
        else:
            response = errors.response_of(failure)
            response.headers.update(self._own)
            await response(scope, receive, send)
        return failure.error.code or "error"
