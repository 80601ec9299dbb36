"""Parts of pages that are sent as they change, as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable

EVENT_STREAM = "text/event-stream"
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would collect the events
_INTERVAL_S = 3.0
_LENGTH_S = 15.0  # after which the browser asks again: a server that stops waits no longer for its pages


class Streams:
    """All streams of a process. Used from one event loop; `end` also from a signal's handler in it.

    interval_s  between two looks
    length_s    of a stream
    """

    def __init__(self, interval_s: float = _INTERVAL_S, length_s: float = _LENGTH_S) -> None:
        self._interval_s, self._length_s = interval_s, length_s
        self._ended = asyncio.Event()

    def end(self) -> None:
        """Streams end, and those that begin later have one event."""
        self._ended.set()

    async def events(self, first: str, look: Callable[[], Awaitable[str | None]]) -> AsyncIterator[str]:
        """An event with the part at the beginning, and one whenever it has changed; a comment where it has not, so
        that a connection which has broken is noticed. Ends where `look` has None.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + self._length_s
        part: str | None = first
        shown = None
        while part is not None:
            yield f"data: {json.dumps(part)}\n\n" if part != shown else ": the same\n\n"
            shown = part
            if loop.time() + self._interval_s > until or await self._has_ended():
                return
            part = await look()

    async def _has_ended(self) -> bool:
        """After the interval, or at once."""
        try:
            async with asyncio.timeout(self._interval_s):
                await self._ended.wait()
        except TimeoutError:
            return False
        return True
