"""A client over a socket of its own, which knows how each response ended, and may be slow or leave."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal
from urllib.parse import urlsplit

import h11

_SMALL_BUFFER = 4096
_READ_BYTES = 1 << 16
_SILENT_S = 120.0  # after which a client gives a connection up


@dataclass(frozen=True, slots=True)
class Manner:
    """How a client sends and reads.

    sends         bytes of the request after which it closes the connection; None: all of them
    leaves_after  bytes of the response after which it closes the connection; None: never
    pause_s       before each read, of at most `read_bytes`
    stall_s       once, after the first bytes
    """

    sends: int | None = None
    leaves_after: int | None = None
    pause_s: float = 0.0
    stall_s: float = 0.0
    read_bytes: int = _READ_BYTES

    @property
    def is_slow(self) -> bool:
        return self.pause_s > 0 or self.stall_s > 0


PATIENT = Manner()


@dataclass(slots=True)
class Reply:
    """`end`: whole as HTTP says it, cut by the other side before that, or left by the client. `why`: it was cut."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    end: Literal["whole", "cut", "left"] = "cut"
    why: str = "the connection was closed"

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")


class Client:
    """One connection at a time, used again where HTTP allows it."""

    def __init__(self, url: str) -> None:
        """`url`: of an endpoint, whose path is put before those of requests."""
        parts = urlsplit(url)
        self._place, self._prefix = (parts.hostname or "", parts.port or 0), parts.path
        self._sock: socket.socket | None = None
        self._http = h11.Connection(our_role=h11.CLIENT)

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    async def ask(
        self,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        manner: Manner = PATIENT,
        on_data: Callable[[Reply, bytes], None] = lambda reply, data: None,
    ) -> Reply:
        """`on_data` is given each part of the body when it has come."""
        reply = Reply()
        has_ended = self._sock is not None and bool(select.select([self._sock], [], [], 0)[0])
        if manner.is_slow or has_ended:
            self.close()  # the size of a buffer is fixed before the connection stands
        try:
            await self._send(path, headers, body, manner)
            if manner.sends is None:
                await self._receive(reply, manner, on_data)
            else:
                reply.end = "left"
        except (OSError, h11.RemoteProtocolError) as e:
            reply.end, reply.why = "cut", repr(e)
        finally:
            done = self._http.our_state is self._http.their_state is h11.DONE
            if reply.end == "whole" and not manner.is_slow and done:
                self._http.start_next_cycle()
            else:
                self.close()
        return reply

    async def _send(self, path: str, headers: Mapping[str, str], body: bytes, manner: Manner) -> None:
        loop = asyncio.get_running_loop()
        if self._sock is None:
            self._sock = socket.socket()
            self._sock.setblocking(False)
            if manner.is_slow:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
            await loop.sock_connect(self._sock, self._place)
            self._http = h11.Connection(our_role=h11.CLIENT)
        fields = {"Host": ":".join(map(str, self._place)), "Content-Type": "application/json", **headers}
        fields["Content-Length"] = str(len(body))
        request = h11.Request(method="POST", target=self._prefix + path, headers=list(fields.items()))
        parts = [self._http.send(event) for event in (request, h11.Data(data=body), h11.EndOfMessage())]
        with suppress(ConnectionError):  # the response may have come before the request was read
            await loop.sock_sendall(self._sock, b"".join(part or b"" for part in parts)[: manner.sends])

    async def _receive(self, reply: Reply, manner: Manner, on_data: Callable[[Reply, bytes], None]) -> None:
        loop = asyncio.get_running_loop()
        assert self._sock is not None
        received, body = 0, bytearray()
        try:
            while True:
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    if manner.leaves_after is not None and received >= manner.leaves_after:
                        reply.end = "left"
                        return
                    await asyncio.sleep(manner.pause_s)
                    if manner.stall_s and received:
                        await asyncio.sleep(manner.stall_s)
                        manner = replace(manner, stall_s=0.0)
                    async with asyncio.timeout(_SILENT_S):
                        data = await loop.sock_recv(self._sock, manner.read_bytes)
                    received += len(data)
                    self._http.receive_data(data)
                elif isinstance(event, h11.Response):
                    reply.status = event.status_code
                    reply.headers = {k.decode().lower(): v.decode() for k, v in event.headers}
                elif isinstance(event, h11.Data):
                    body += event.data
                    on_data(reply, bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    reply.end = "whole"
                    return
                else:  # the connection was closed
                    return
        finally:
            reply.body = bytes(body)
