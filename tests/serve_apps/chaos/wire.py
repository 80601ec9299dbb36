"""A client over a socket of its own, which knows how each response ended, and may be slow or leave."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import h11

_SMALL_BUFFER = 4096
_READ_BYTES = 1 << 16


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


@dataclass(slots=True)
class Reply:
    """`end`: whole as HTTP says it, cut by the other side before that, or left by the client."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    end: Literal["whole", "cut", "left"] = "cut"


class Client:
    """One connection at a time, used again where HTTP allows it."""

    def __init__(self, host: str, port: int) -> None:
        self._place = host, port
        self._sock: socket.socket | None = None
        self._http = h11.Connection(our_role=h11.CLIENT)

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    async def ask(self, path: str, headers: dict[str, str], body: bytes, manner: Manner) -> Reply:
        reply = Reply()
        if manner.is_slow:
            self.close()  # the size of a buffer is fixed before the connection stands
        try:
            await self._send(path, headers, body, manner)
            if manner.sends is None:
                await self._receive(reply, manner)
            else:
                reply.end = "left"
        except (OSError, h11.RemoteProtocolError):
            reply.end = "cut"
        if reply.end == "whole" and not manner.is_slow and self._http.our_state is self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        else:
            self.close()
        return reply

    async def _send(self, path: str, headers: dict[str, str], body: bytes, manner: Manner) -> None:
        loop = asyncio.get_running_loop()
        if self._sock is None:
            self._sock = socket.socket()
            self._sock.setblocking(False)
            if manner.is_slow:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
            await loop.sock_connect(self._sock, self._place)
            self._http = h11.Connection(our_role=h11.CLIENT)
        fixed = {
            "Host": ":".join(map(str, self._place)),
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
        }
        head = self._http.send(h11.Request(method="POST", target=path, headers=list((fixed | headers).items())))
        data = self._http.send(h11.Data(data=body))
        end = self._http.send(h11.EndOfMessage())
        with suppress(ConnectionError):  # the response may have come before the request was read
            await loop.sock_sendall(self._sock, ((head or b"") + (data or b"") + (end or b""))[: manner.sends])

    async def _receive(self, reply: Reply, manner: Manner) -> None:
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
                    if manner.pause_s:
                        await asyncio.sleep(manner.pause_s)
                    if manner.stall_s and received:
                        await asyncio.sleep(manner.stall_s)
                        manner = Manner(leaves_after=manner.leaves_after)
                    data = await loop.sock_recv(self._sock, manner.read_bytes)
                    received += len(data)
                    self._http.receive_data(data)
                elif isinstance(event, h11.Response):
                    reply.status = event.status_code
                    reply.headers = {k.decode().lower(): v.decode() for k, v in event.headers}
                elif isinstance(event, h11.Data):
                    body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    reply.end = "whole"
                    return
                else:  # the connection was closed
                    return
        finally:
            reply.body = bytes(body)
