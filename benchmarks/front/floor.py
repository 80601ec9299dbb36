"""The least that a server of event streams does in Python: it reads the end of a request and writes ready-made events.

It checks nothing, tokenises nothing and formats nothing, and has no task for a request.
"""

from __future__ import annotations

import asyncio
import re
from typing import cast

_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def chunk(text: str) -> bytes:
    """One chunk of an HTTP response."""
    body = text.encode()
    return b"%x\r\n%b\r\n" % (len(body), body)


class FloorProtocol(asyncio.Protocol):
    """Answers each request of its connection with `max_tokens` events, one a turn of the loop."""

    def __init__(self, event: bytes) -> None:
        self._event = event
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._received.endswith(b"}"):  # of the JSON body
            found = re.search(rb'"max_tokens": (\d+)', self._received)
            assert found is not None
            self._received = b""
            self._left = int(found[1])
            self._transport.write(_HEAD)
            self._step()

    def _step(self) -> None:
        if self._transport.is_closing():
            return
        self._left -= 1
        self._transport.write(self._event)
        if self._left:
            self._loop.call_soon(self._step)
        else:
            self._transport.write(_END)
