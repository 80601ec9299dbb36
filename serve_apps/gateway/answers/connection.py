"""The client's side of an answer: the status at the first text, heart-beats, and whether the client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.types import Message, Receive, Send

HEARTBEAT = ": waiting\n\n"  # a comment, which clients of server-sent events skip


class Connection:
    """Sends one response. Several tasks may write; each text goes out whole.

    heartbeat_s  after which a silent stream gets a comment; None: never
    """

    def __init__(self, send: Send, headers: Sequence[tuple[bytes, bytes]], heartbeat_s: float | None) -> None:
        self._send, self._headers, self._heartbeat_s = send, headers, heartbeat_s
        self._writing = asyncio.Lock()
        self._time = asyncio.get_running_loop().time
        self._written_at = self._time()
        self.started = False  # the status has been sent
        self.is_blocked = False  # a write waits until the client reads, or was cancelled while it did

    async def write(self, text: str) -> None:
        message = {"type": "http.response.body", "body": text.encode(), "more_body": True}
        async with self._writing:
            self.is_blocked = True
            if not self.started:
                await self._start(self._headers)
            await self._send(message)
            self.is_blocked = False
        self._written_at = self._time()

    async def end(self, text: str) -> None:
        message: Message = {"type": "http.response.body", "body": text.encode(), "more_body": False}
        async with self._writing:
            self.is_blocked = True
            if not self.started:
                await self._start([*self._headers, (b"content-length", str(len(message["body"])).encode())])
            await self._send(message)
            self.is_blocked = False

    async def until_left(self, receive: Receive) -> None:
        """Returns when the client has disconnected. Writes the heart-beats meanwhile."""
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
                    await self.write(HEARTBEAT)

    async def _start(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": list(headers)})
