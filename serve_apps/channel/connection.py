"""A replica's end: it connects to gateways, sends them what its engine computes, and reports the adapters it holds."""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

from loray.policy.routing import Held, RoutingSeries
from loray.telemetry import get_logger
from serve_apps.channel.frames import (
    AGAIN,
    ALIVE,
    END,
    HELLO,
    LOAD,
    SENT,
    WELCOME,
    ChannelAddress,
    FrameError,
    FrameReader,
    Heartbeat,
    Output,
    dial,
    frame,
    pack,
    pack_delta,
    parts,
)

PERIOD_S = 5.0  # between two reports: the router remembers what it has sent since
LOAD_S = 0.25  # between two looks how many streams each gateway has
MAX_BACKLOG = 32 << 20  # bytes
_AT_ONCE = 64  # pieces of the backlog, sent under the lock
_HANDSHAKE_S = 10.0
_READ_BYTES = 1 << 16

_log = get_logger(__name__)
Left = Callable[[str], None]  # called with "stop", "abort" or "lost"


class Reporting:
    """Reports the adapters that a replica holds: all at once, then every period what has changed, if anything has.
    There is one for each connection.

    That the replica still lives, the connection's heartbeat says.
    """

    def __init__(self, held: Callable[[], Held], write: Callable[[bytes], object]) -> None:
        self._held, self._write = held, write
        self._series = RoutingSeries(secrets.token_hex(8))
        self._report()

    def again(self) -> None:
        """Report everything once more: the gateway has missed something."""
        self._series.restart()
        self._send()

    def stop(self) -> None:
        self._timer.cancel()

    def _report(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(PERIOD_S, self._report)
        self._send()

    def _send(self) -> None:
        for delta in self._series.deltas(self._held()):
            self._write(pack_delta(delta))


class SocketWriter:
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
        """Send data, from any thread. Does nothing once the writer has failed or is closed."""
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
        """Send `parts` of the stream, after those that it has left. May be called from any thread."""
        with self._lock:
            if self._closed:
                return
            if not self._backlog and not self._turns:
                self._soon(self._arm)
            if stream not in self.behind:
                self._turns.append(stream)
            self.behind.setdefault(stream, deque()).append(parts)

    def drop(self, stream: int) -> None:
        """Forget the parts of this stream that are left, which nobody wants."""
        with self._lock:
            self.behind.pop(stream, None)

    def close(self) -> None:
        """Stop. Called in the event loop, before the socket is closed."""
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
        """Put the next part of a stream into the backlog. The lock, for which others wait, is not held meanwhile."""
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


class Cipher:
    """TLS apart from the socket: the engine's thread sends while the event loop reads. Without a context what a
    connection carries and what is said over it are the same.

    May be used from any thread. What is encrypted must be sent in the order of the calls. OSError where the other end
    is not one that the context trusts, or what comes is not TLS.
    """

    def __init__(self, context: ssl.SSLContext | None, host: str) -> None:
        """`host`: which was dialled; the other end's certificate must name it."""
        self._lock = threading.Lock()
        self._received, self._unsent = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = None if context is None else context.wrap_bio(self._received, self._unsent, server_hostname=host)

    async def greet(self, sock: socket.socket) -> None:
        """Shake hands, before anything else is sent."""
        if self._tls is None:
            return
        loop = asyncio.get_running_loop()
        while True:
            is_done = _shaken(self._tls)
            if unsent := self._unsent.read():
                await loop.sock_sendall(sock, unsent)
            if is_done:
                return
            data = await loop.sock_recv(sock, _READ_BYTES)
            if not data:
                raise ConnectionError("the other end has ended the TLS handshake")
            self._received.write(data)

    def encrypt(self, said: bytes) -> bytes:
        if self._tls is None:
            return said
        with self._lock:
            left = memoryview(said)
            while left:
                left = left[self._tls.write(left) :]
            return self._unsent.read()

    def decrypt(self, carried: bytes) -> bytes:
        """Decrypt what is complete of what has come."""
        if self._tls is None:
            return carried
        said = bytearray()
        with self._lock:
            self._received.write(carried)
            try:
                while part := self._tls.read(_READ_BYTES):
                    said += part
            except ssl.SSLWantReadError:
                pass
        return bytes(said)


def _shaken(tls: ssl.SSLObject) -> bool:
    """Tell whether the handshake is complete; otherwise more must be received."""
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


class Connection:
    """A connection to a gateway. Results may be sent from any thread; everything else is called in the event loop.

    When the connection ends, whatever the reason, all its streams are told that they are lost.
    """

    def __init__(self, sock: socket.socket, cipher: Cipher, name: str, held: Callable[[], Held] = Held) -> None:
        """`held`: the adapters that the replica holds, which the gateway is told."""
        self.name = name
        self.is_open = True
        self._sock, self._cipher = sock, cipher
        self._writer = SocketWriter(sock, asyncio.get_running_loop(), self._end, cipher.encrypt)
        self._heartbeat = Heartbeat(self._writer.write, self._end)
        self._reporting = Reporting(held, self._writer.write)
        self._streams: dict[int, Left] = {}
        self._num_told = 0  # of other gateways' streams
        self._reader = asyncio.create_task(self._read())

    def send(self, outputs: Sequence[tuple[int, Output]]) -> None:
        """Send results, each with its stream. Never waits.

        A prompt's log-probabilities are packed and sent in parts, when the gateway has read what came before; the
        tokens of their stream follow them, and those of others go on.
        """
        behind = self._writer.behind
        late = {s for s, out in outputs if out.prompt_logprobs is not None or s in behind}
        if late:
            for stream, output in outputs:
                if stream in late:
                    self._writer.write_later(stream, parts(stream, output))
            outputs = [(s, out) for s, out in outputs if s not in late]
        if outputs:
            self._writer.write(frame(SENT, time.monotonic()) + pack(outputs))

    def watch(self, stream: int, left: Left) -> None:
        """Have `left` called once the gateway wants no more of this stream, or the connection has ended."""
        if self.is_open:
            self._streams[stream] = left
        else:
            left("lost")

    def unwatch(self, stream: int) -> None:
        self._streams.pop(stream, None)

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def tell_load(self, num_of_others: int) -> None:
        """Tell the gateway how many streams other gateways have here, if that has changed."""
        if num_of_others != self._num_told:
            self._num_told = num_of_others
            self._writer.write(frame(LOAD, num_of_others))

    def close(self) -> None:
        self._end("closed")

    async def _read(self) -> None:
        loop, frames = asyncio.get_running_loop(), FrameReader()
        try:
            while data := await loop.sock_recv(self._sock, _READ_BYTES):
                self._heartbeat.heard()
                for kind, *fields in frames.feed(self._cipher.decrypt(data)):
                    self._take(kind, *fields)
            self._end("the gateway closed it")
        except (OSError, FrameError, ValueError, TypeError) as e:
            self._end(str(e))

    def _take(self, kind: object, *fields: Any) -> None:
        if kind == END:
            stream, reason = fields
            self._writer.drop(stream)
            left = self._streams.pop(stream, None)
            if left is not None:
                left(reason)
        elif kind == AGAIN:
            self._reporting.again()
            self._num_told = 0
        elif kind != ALIVE:
            raise FrameError(f"kind {kind}")

    def _end(self, reason: str) -> None:
        if not self.is_open:
            return
        self.is_open = False
        streams, self._streams = self._streams, {}
        level = _log.warning if streams else _log.info
        level("connection to a gateway ended with %d streams: %s", len(streams), reason)
        self._heartbeat.stop()
        self._reporting.stop()
        self._writer.close()
        # The loop must forget the socket's number before another socket gets it: it would take the other one for this
        # one, and never read it.
        asyncio.get_running_loop().remove_reader(self._sock)
        self._reader.cancel()
        self._sock.close()
        for left in streams.values():
            left("lost")


async def connect(
    address: ChannelAddress, node: str, name: str, held: Callable[[], Held] = Held, tls: ssl.SSLContext | None = None
) -> Connection:
    """Connect a replica on `node` to the gateway; `name` is the connection's. `tls`: to gateways on other nodes. Raises
    OSError, also if the gateway is silent.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(_HANDSHAKE_S):
        cipher = Cipher(None if address.node == node else tls, address.host)
        sock = await dial(address, node)
        try:
            await cipher.greet(sock)
            await loop.sock_sendall(sock, cipher.encrypt(address.token.encode() + frame(HELLO, name)))
            frames = FrameReader()
            answer: list[tuple[object, ...]] = []
            while not answer:
                data = await loop.sock_recv(sock, _READ_BYTES)
                if not data:
                    raise ConnectionError("the gateway refused the connection")
                answer += frames.feed(cipher.decrypt(data))
            if answer != [(WELCOME,)]:
                raise ConnectionError("the gateway answered something else")
        except FrameError as e:
            sock.close()
            raise ConnectionError(str(e)) from e
        except BaseException:
            sock.close()
            raise
    return Connection(sock, cipher, name, held)


class Connections:
    """A replica's connections, at most one to each gateway. Used from one event loop."""

    def __init__(
        self, node: str, replica: str, held: Callable[[], Held] = Held, tls: ssl.SSLContext | None = None
    ) -> None:
        """`held`: the adapters that the replica holds, which each gateway is told. `tls`: to those on other nodes."""
        self._node, self._replica, self._held, self._tls = node, replica, held, tls
        self._numbers = count()
        self._to: dict[ChannelAddress, asyncio.Task[Connection]] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def to(self, address: ChannelAddress) -> Connection:
        """Return the connection that stands, or a new one. Raises OSError if the gateway cannot be reached."""
        task = self._to.get(address)
        if task is not None and task.done() and not (task.exception() is None and task.result().is_open):
            task = None
        if task is None:
            for gone in [a for a, t in self._to.items() if t.done() and (t.exception() or not t.result().is_open)]:
                del self._to[gone]
            name = f"{self._replica}#{next(self._numbers)}"
            task = self._to[address] = asyncio.create_task(connect(address, self._node, name, self._held, self._tls))
        connection = await asyncio.shield(task)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOAD_S, self._tell_loads)
        return connection

    def _tell_loads(self) -> None:
        """Tell each gateway how many streams the others have, and go on with it while there are streams."""
        done = [task for task in self._to.values() if task.done() and not task.cancelled() and not task.exception()]
        standing = [connection for task in done if (connection := task.result()).is_open]
        num_streams = sum(connection.num_streams for connection in standing)
        for connection in standing:
            connection.tell_load(num_streams - connection.num_streams)
        self._timer = asyncio.get_running_loop().call_later(LOAD_S, self._tell_loads) if num_streams else None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for task in self._to.values():
            if not task.done():
                task.cancel()
            elif not task.cancelled() and task.exception() is None:
                task.result().close()
        self._to.clear()
