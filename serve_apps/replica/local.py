"""An engine's streams for a gateway in the same process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING

from serve_apps.channel.inbox import Inbox, reading
from serve_apps.channel.wakes import Wakes
from serve_apps.replica.requests import Requests

if TYPE_CHECKING:
    from loray.engine.request import TokenOutput
    from loray.spec import GenerateRequest, TokenDelta


class LocalStreams:
    """Used from one event loop, which is woken once a step for all streams."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._ids, self._wakes = count(), Wakes()
        self._inboxes: dict[int, Inbox] = {}
        self._left: dict[int, Callable[[str], None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        """As the gateway's `Engines.generate`."""
        self._loop = asyncio.get_running_loop()
        stream = next(self._ids)
        inbox = self._inboxes[stream] = Inbox(stream, self._wakes)
        call = asyncio.create_task(self._requests.run(request, fit, self, stream))
        call.add_done_callback(lambda done: _pass_on(done, inbox))

        def left(reason: str) -> None:
            del self._inboxes[stream]
            if inbox.has_ended:
                return
            tell = self._left.get(stream)
            if tell is not None:
                tell(reason)
            else:
                call.cancel()  # it has not begun, or is over

        with reading(request, left):
            async for delta in inbox:
                yield delta

    def send(self, outputs: Sequence[tuple[int, TokenOutput]]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._put, outputs)

    def watch(self, stream: int, left: Callable[[str], None]) -> None:
        self._left[stream] = left

    def unwatch(self, stream: int) -> None:
        self._left.pop(stream, None)

    def _put(self, outputs: Sequence[tuple[int, TokenOutput]]) -> None:
        for stream, out in outputs:
            inbox = self._inboxes.get(stream)
            if inbox is None:
                continue
            if out.prompt_logprobs is not None:
                inbox.push_prompt(out.prompt_logprobs)
            inbox.push(out.token_id, out.finish_reason, out.num_cached_tokens, out.logprobs)


def _pass_on(call: asyncio.Task[None], inbox: Inbox) -> None:
    error = None if call.cancelled() else call.exception()
    if isinstance(error, Exception):
        inbox.fail(error)
