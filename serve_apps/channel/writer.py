"""Bytes out on a socket, from a thread that must not wait for it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress

MAX_BACKLOG = 32 << 20  # bytes
_AT_ONCE = 64


class Writer:
    """Sends at once what the kernel takes; the event loop sends the rest when the socket is writable again.

    What a stream has much of is sent part by part when nothing else is left, of all such streams in turn: it is no
    backlog, and others wait for one part of it at most.

    behind  the streams of which parts are left

    A reader that is MAX_BACKLOG bytes behind when more comes is given up. `failed` is called in the event loop, once,
    with the reason.
    """

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        failed: Callable[[str], None],
        encrypt: Callable[[bytes], bytes],
    ) -> None:
        self._sock, self._loop, self._failed, self._encrypt = sock, loop, failed, encrypt
        self._lock = threading.Lock()
        self._backlog: deque[memoryview] = deque()
        self._num_behind = 0
        self.behind: dict[int, deque[Iterator[bytes]]] = {}
        self._turns: deque[int] = deque()  # those streams, in the order in which they are next
        self._closed = False

    def write(self, data: bytes) -> None:
        """May be called from any thread. Does nothing once the writer has failed or is closed."""
        with self._lock:
            if self._closed:
                return
            if self._num_behind > MAX_BACKLOG:
                self._fail(f"it is {self._num_behind >> 20} MiB behind")
                return
            data = self._encrypted(data)
            sent = 0 if self._backlog else self._send(data)
            if sent < len(data) and not self._closed:
                if not self._backlog:
                    self._soon(self._arm)
                self._backlog.append(memoryview(data)[sent:])
                self._num_behind += len(data) - sent

    def write_later(self, stream: int, parts: Iterator[bytes]) -> None:
        """`parts` of the stream, after those that it has left. May be called from any thread."""
        with self._lock:
            if self._closed:
                return
            if not self._backlog and not self._turns:
                self._soon(self._arm)
            if stream not in self.behind:
                self._turns.append(stream)
            self.behind.setdefault(stream, deque()).append(parts)

    def drop(self, stream: int) -> None:
        """Nobody wants the parts of this stream that are left."""
        with self._lock:
            self.behind.pop(stream, None)

    def close(self) -> None:
        """Called in the event loop, before the socket is closed."""
        with self._lock:
            self._closed = True
            self._backlog.clear()
            self.behind.clear()
            self._turns.clear()
            self._loop.remove_writer(self._sock)

    def _arm(self) -> None:
        with self._lock:
            if not self._closed:
                self._loop.add_writer(self._sock, self._flush)

    def _flush(self) -> None:
        self._pack_part()
        with self._lock:
            for _ in range(_AT_ONCE):  # then other threads may write
                if not self._backlog or self._closed:
                    if not self._turns or self._closed:
                        self._loop.remove_writer(self._sock)
                    return
                data = self._backlog.popleft()
                sent = self._send(data)
                self._num_behind -= sent
                if sent < len(data):
                    self._backlog.appendleft(data[sent:])
                    return

    def _pack_part(self) -> None:
        """Puts the next part of a stream into the backlog. The lock, for which others wait, is not held meanwhile."""
        while True:
            with self._lock:
                if self._backlog or not self._turns:
                    return
                stream = self._turns.popleft()
                waiting = self.behind.get(stream)
                if waiting is None:  # dropped
                    continue
            part = next(waiting[0], None)
            with self._lock:
                if part is None:
                    waiting.popleft()
                else:
                    data = self._encrypted(part)
                    self._backlog.append(memoryview(data))
                    self._num_behind += len(data)
                if self.behind.get(stream) is not waiting:
                    continue
                if waiting:
                    self._turns.append(stream)
                else:
                    del self.behind[stream]

    def _encrypted(self, data: bytes) -> bytes:
        try:
            return self._encrypt(data)
        except OSError as e:
            self._fail(str(e))
            return b""

    def _send(self, data: bytes | memoryview) -> int:
        try:
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as e:
            self._fail(str(e))
            return 0

    def _fail(self, reason: str) -> None:
        self._closed = True
        self._soon(lambda: self._failed(reason))

    def _soon(self, callback: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed, and with it the process
            self._loop.call_soon_threadsafe(callback)
