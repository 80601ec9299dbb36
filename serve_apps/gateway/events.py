"""Server-sent events: deltas as chunks. The engine's streams are closed when the connection is."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from loray.api.openai.formats import Choice, ResponseFormat, usage_of
from loray.api.openai.requests import GenerationRequest
from serve_apps.gateway import errors
from serve_apps.gateway.engines import ChoiceDelta

SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """A response that closes the engine's streams as soon as the client disconnects, not at garbage collection."""

    def __init__(
        self, events: AsyncGenerator[str, None], deltas: AsyncGenerator[ChoiceDelta, None], **options: Any
    ) -> None:
        super().__init__(events, media_type="text/event-stream", **options)
        self._events, self._deltas = events, deltas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._deltas.aclose()


async def stream_events(
    first: ChoiceDelta,
    deltas: AsyncGenerator[ChoiceDelta, None],
    choices: Sequence[Choice],
    answer: ResponseFormat,
    request: GenerationRequest,
) -> AsyncGenerator[str, None]:
    """Yields server-sent events. An error after the first delta becomes an event: the status has been sent already."""
    opened: set[int] = set()
    try:
        async for index, delta in _chain(first, deltas):
            choices[index].count(delta)
            if index not in opened and (opening := answer.opening(index)):
                yield _event(opening.to_json())
            opened.add(index)
            if delta.text or delta.finish_reason or delta.logprobs:
                yield _event(answer.chunk(index, delta).to_json())
    except Exception as e:  # noqa: BLE001 - failure_of logs unexpected errors; the stream must end with a reason
        yield _event(errors.failure_of(e).body)
        return
    if request.include_usage:
        yield _event(answer.usage_chunk(usage_of(choices, request.n)).to_json())
    yield _event("[DONE]")


async def _chain(first: ChoiceDelta, rest: AsyncGenerator[ChoiceDelta, None]) -> AsyncGenerator[ChoiceDelta, None]:
    yield first
    async for delta in rest:
        yield delta


def _event(data: str) -> str:
    return f"data: {data}\n\n"
