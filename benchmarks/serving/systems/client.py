"""A client of OpenAI's completions that takes as little of the processor as possible while answers come.

It notes when bytes arrive and reads them when the pass is over: on a machine without spare cores whatever the client
computes for a token delays the server's next one.
"""

from __future__ import annotations

import asyncio
import json
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, NamedTuple, cast

_END_OF_HEAD = b"\r\n\r\n"


class Received(NamedTuple):
    """An answer as it came: (time.perf_counter(), bytes) of each receipt."""

    parts: list[tuple[float, bytes]]


class _Receiver(asyncio.Protocol):
    def __init__(self, request: bytes) -> None:
        self._request = request
        self.parts: list[tuple[float, bytes]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self.parts.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def ask(port: int, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> Received:
    """POST `body` to a server of this machine, which closes the connection after its answer."""
    content = json.dumps(body).encode()
    fields = {
        "Host": f"127.0.0.1:{port}",
        "Connection": "close",
        "Content-Type": "application/json",
        "Content-Length": str(len(content)),
        **headers,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    request = f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + content
    transport, receiver = await asyncio.get_running_loop().create_connection(
        lambda: _Receiver(request), "127.0.0.1", port
    )
    try:
        await receiver.ended
    finally:
        transport.close()
    return Received(receiver.parts)


def read_body(received: Received) -> Iterator[tuple[float, bytes]]:
    """Pieces of the body, each with the time at which its last byte came. RuntimeError unless the status is 200."""
    raw = b"".join(data for _, data in received.parts)
    head, separator, _ = raw.partition(_END_OF_HEAD)
    if not separator:
        raise RuntimeError(f"the server closed the connection after {len(raw)} bytes")
    at = len(head) + len(separator)
    is_chunked = b"transfer-encoding: chunked" in head.lower()
    if not head.split(b"\r\n", 1)[0].startswith(b"HTTP/1.1 200"):
        body = b"".join(data for _, data in _chunks(raw, at)) if is_chunked else raw[at:]
        raise RuntimeError(f"{head.split()[1].decode()}: {body.decode(errors='replace')[:300]}")
    ends = list(accumulate(len(data) for _, data in received.parts))
    for end, data in _chunks(raw, at) if is_chunked else [(len(raw), raw[at:])]:
        yield received.parts[bisect_left(ends, end)][0], data


def read_events(received: Received) -> Iterator[tuple[float, dict[str, Any]]]:
    """The server-sent events with the times at which they came, without comments and the closing [DONE]."""
    rest = b""
    for at, data in read_body(received):
        *whole, rest = (rest + data).split(b"\n\n")
        for text in whole:
            if text.startswith(b"data: ") and text != b"data: [DONE]":
                event: dict[str, Any] = json.loads(text[6:])
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                yield at, event


def _chunks(raw: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """(offset of its end in `raw`, data) of each chunk from `at` on."""
    while True:
        size_end = raw.find(b"\r\n", at)
        if size_end < 0:
            raise RuntimeError("the server closed the connection in the middle of its answer")
        size = int(raw[at:size_end].split(b";")[0], 16)
        if not size:
            return
        start = size_end + 2
        if start + size > len(raw):
            raise RuntimeError("the server closed the connection in the middle of its answer")
        yield start + size, raw[start : start + size]
        at = start + size + 2
