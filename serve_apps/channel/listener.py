"""A gateway's end: it listens for replicas, and hands what they send to the inboxes of its streams."""

from __future__ import annotations

import asyncio
import hmac
import math
import os
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

from loray.errors import ReplicaLost
from loray.policy.routing import RoutingDelta, RoutingReports
from loray.sockets import abstract, peer_user
from loray.telemetry import get_logger
from serve_apps.channel.frames import (
    AGAIN,
    ALIVE,
    EMBEDDED,
    END,
    HELLO,
    LOAD,
    PROMPT,
    REPORT,
    SCORED,
    SENT,
    TOKEN_BYTES,
    TOKENS,
    WELCOME,
    ChannelAddress,
    FrameError,
    FrameReader,
    Heartbeat,
    frame,
    unpack_delta,
    unpack_embedding,
    unpack_logprobs,
)
from serve_apps.channel.inbox import Inbox, Wakes

_log = get_logger(__name__)

_HANDSHAKE_S = 10.0
_MAX_STRANGERS = 128  # connections that have not shown the token yet
_STREAM_BITS = 62
_LOST = "the replica that served this request was lost; send it again"
_WINDOW_S = 60.0  # of RecentLeast
_LOST_S = 2.0  # after a connection's end, for the call to say what happened


class RecentLeast:
    """Keeps the least value of the last one to two minutes. `now`: seconds of one clock."""

    def __init__(self) -> None:
        self._least = self._least_before = math.inf
        self._window_ends = -math.inf

    def add(self, value: float, now: float) -> float:
        """Add a value, and return the least."""
        if now >= self._window_ends:
            self._least_before, self._least = self._least, math.inf
            self._window_ends = now + _WINDOW_S
        self._least = min(self._least, value)
        return self.value

    @property
    def value(self) -> float:
        """The least value; inf: there was none."""
        return min(self._least, self._least_before)


class Lateness:
    """Tells by how much longer than usual the messages of one connection are under way.

    The clocks of both sides differ by an unknown time, which drifts slowly. So the shortest way of late counts as usual
    (one-way delay over base delay: LEDBAT, RFC 6817).
    """

    def __init__(self) -> None:
        self._shortest = RecentLeast()

    def of(self, sent_at: float, now: float) -> float:
        """Return the lateness of the message that came `now`. Seconds, each of its side's clock."""
        return now - sent_at - self._shortest.add(now - sent_at, now)


class Listener:
    """Listens for replicas, and gives tokens to inboxes. Used from one event loop."""

    def __init__(self, reports: RoutingReports | None = None, late: Callable[[float], None] = lambda _: None) -> None:
        """`reports` gets what the replicas report; `late` by how many seconds each step's tokens come late."""
        self._reports, self._late = reports or RoutingReports(), late
        self._wakes = Wakes()
        # A replica that was not given a stream cannot guess which number it has.
        self._ids: Iterator[int] = iter(partial(secrets.randbits, _STREAM_BITS), None)
        self._inboxes: dict[int, Inbox] = {}
        self._sources: dict[int, _Peer] = {}  # stream → the connection from which its tokens come, alone
        self._peers: dict[str, _Peer] = {}  # by the connection's name
        self._reporters: dict[str, _Peer] = {}  # replica → its last connection, whose reports count
        self._all: set[_Peer] = set()
        self._servers: list[asyncio.Server] = []
        self._token = secrets.token_hex(TOKEN_BYTES // 2)
        self._address: ChannelAddress | None = None

    @property
    def address(self) -> ChannelAddress:
        assert self._address is not None, "start it first"
        return self._address

    async def start(self, node: str, host: str, tls: ssl.SSLContext | None = None) -> None:
        """Listen on `node` and, for other nodes, at a free port of `host`, there with TLS if it is given."""
        loop = asyncio.get_running_loop()
        name = f"loray-{secrets.token_hex(16)}"
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unix.bind(abstract(name))
        unix.setblocking(False)
        tcp = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        tcp.bind((host, 0))
        tcp.setblocking(False)
        self._address = ChannelAddress(node, name, host, tcp.getsockname()[1], self._token)
        self._servers = [
            await loop.create_unix_server(lambda: _Peer(self), sock=unix),
            await loop.create_server(
                lambda: _Peer(self), sock=tcp, ssl=tls, ssl_handshake_timeout=None if tls is None else _HANDSHAKE_S
            ),
        ]

    async def close(self) -> None:
        """End all connections; their streams fail."""
        for server in self._servers:
            server.close()
        for peer in list(self._all):
            peer.abort("the gateway closes")
        await asyncio.sleep(0)  # for the connections' last callbacks

    def open(self) -> Inbox:
        """Open a new stream, for one attempt of one request."""
        inbox = Inbox(next(self._ids), self._wakes)
        self._inboxes[inbox.stream] = inbox
        return inbox

    def forget(self, inbox: Inbox, reason: str) -> bool:
        """Drop the stream. If its tokens still come, tell their replica to end it, for `reason` "stop" or "abort".

        False if no replica could be told: the call must be cancelled then.
        """
        self._inboxes.pop(inbox.stream, None)
        peer = self._sources.pop(inbox.stream, None)
        if inbox.has_ended:
            return True
        return peer is not None and peer.write(frame(END, inbox.stream, reason))

    def returned(self, inbox: Inbox, connection: str) -> None:
        """The call has ended without an error: the rest of its tokens is under way on this connection, or lost."""
        if inbox.has_ended or inbox.stream not in self._inboxes:
            return
        peer = self._peers.get(connection)
        if peer is None:
            inbox.fail(ReplicaLost(_LOST))
        else:
            self._sources.setdefault(inbox.stream, peer)

    # -- connections --------------------------------------------------------------------------------------------------

    def joined(self, peer: _Peer) -> bool:
        """A stranger has connected. False: there are too many of them."""
        self._all.add(peer)
        return sum(not p.is_known for p in self._all) <= _MAX_STRANGERS

    def accepts(self, token: bytes) -> bool:
        return hmac.compare_digest(token, self._token.encode())

    def named(self, peer: _Peer, name: str) -> None:
        self._peers[name] = peer
        if peer.replica is not None:
            self._reporters[peer.replica] = peer

    def replicas(self) -> frozenset[str]:
        """Return the names of the replicas that are connected."""
        return frozenset(self._reporters)

    def left(self, peer: _Peer) -> None:
        """A connection has ended. The calls of its streams say why; if they do not, the replica counts as lost."""
        self._all.discard(peer)
        if peer.name is not None and self._peers.get(peer.name) is peer:
            del self._peers[peer.name]
        if peer.replica is not None and self._reporters.get(peer.replica) is peer:
            del self._reporters[peer.replica]
        inboxes = [self._inboxes[stream] for stream, source in self._sources.items() if source is peer]
        if inboxes:
            asyncio.get_running_loop().call_later(_LOST_S, _fail, inboxes, peer.replica)

    def take(self, peer: _Peer, fields: tuple[Any, ...]) -> None:
        """Take one frame. Raises ValueError or TypeError if it is none that a replica sends."""
        kind, *rest = fields
        if kind in (TOKENS, SCORED):
            (items,) = rest
            for stream, token, finish_reason, num_cached_tokens, *scored in items:
                inbox = self._of(stream, peer)
                if inbox is not None:
                    inbox.push(token, finish_reason, num_cached_tokens, *map(unpack_logprobs, scored))
        elif kind == SENT:
            (sent_at,) = rest
            self._late(peer.lateness.of(sent_at, time.monotonic()))
        elif kind == PROMPT:
            stream, part = rest
            inbox = self._of(stream, peer)
            if inbox is not None:
                inbox.push_prompt(map(unpack_logprobs, part))
        elif kind == EMBEDDED:
            stream, packed = rest
            inbox = self._of(stream, peer)
            if inbox is not None:
                inbox.push_embedding(unpack_embedding(packed))
        elif kind == REPORT:
            self._reported(peer, unpack_delta(rest))
        elif kind == LOAD:
            (number,) = rest
            if not isinstance(number, int):
                raise TypeError("a load that is no number")
            if peer.replica is not None and self._reporters.get(peer.replica) is peer:
                self._reports.loaded(peer.replica, number, time.monotonic())
        elif fields == (ALIVE,):
            self._reported(peer, None)
        else:
            raise ValueError(f"a frame of kind {kind}")

    def _reported(self, peer: _Peer, delta: RoutingDelta | None) -> None:
        """`delta` None: nothing but a sign of life."""
        replica = peer.replica
        if replica is None or self._reporters.get(replica) is not peer:
            return
        if delta is None:
            self._reports.alive(replica, time.monotonic())
        elif not self._reports.take(replica, delta, time.monotonic()):
            peer.write(frame(AGAIN))

    def _of(self, stream: int, peer: _Peer) -> Inbox | None:
        """None for a stream that has been dropped, whose tokens were on the way, and for one that another connection
        has: Serve may call a second replica where it loses sight of the first. The second one's work is ended.
        """
        inbox = self._inboxes.get(stream)
        if inbox is None:
            return None
        source = self._sources.setdefault(stream, peer)
        if source is peer:
            return inbox
        if stream not in peer.others:
            peer.others.add(stream)
            _log.warning("tokens of replica %s are ignored: replica %s has their stream", peer.replica, source.replica)
            peer.write(frame(END, stream, "abort"))
        return None


class _Peer(asyncio.Protocol):
    """A connection from a replica. Before it has shown the token, nothing else of it is looked at."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._shown = b""
        self._frames = FrameReader()
        self.lateness = Lateness()
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._heartbeat: Heartbeat | None = None
        self.is_known = False
        self.name: str | None = None
        self.others: set[int] = set()  # streams of other connections whose tokens it has sent

    @property
    def replica(self) -> str | None:
        return None if self.name is None else self.name.partition("#")[0]

    def write(self, data: bytes) -> bool:
        """Write, and tell whether the connection stands."""
        if self._transport is None or self._transport.is_closing():
            return False
        self._transport.write(data)
        return True

    def abort(self, reason: str) -> None:
        _log.info("connection from replica %s is ended: %s", self.replica, reason)
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._deadline = asyncio.get_running_loop().call_later(_HANDSHAKE_S, self.abort, "it did not show the token")
        sock = transport.get_extra_info("socket")
        if not self._listener.joined(self):
            self.abort("too many strangers")
        elif sock.family == socket.AF_UNIX and peer_user(sock) != os.getuid():
            self.abort("it is another user's")

    def data_received(self, data: bytes) -> None:
        if not self.is_known:
            self._shown += data
            if len(self._shown) < TOKEN_BYTES:
                return
            if not self._listener.accepts(self._shown[:TOKEN_BYTES]):
                self.abort("it has not the token")
                return
            data, self._shown, self.is_known = self._shown[TOKEN_BYTES:], b"", True
        if self._heartbeat is not None:
            self._heartbeat.heard()
        try:
            for fields in self._frames.feed(data):
                self._take(fields)
        except (FrameError, ValueError, TypeError) as e:
            self.abort(f"it sent no frame: {e}")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if self._heartbeat is not None:
            self._heartbeat.stop()
        self._listener.left(self)

    def _take(self, fields: tuple[Any, ...]) -> None:
        if self.name is not None:
            self._listener.take(self, fields)
            return
        kind, name = fields
        if kind != HELLO or not isinstance(name, str):
            raise ValueError("no greeting")
        assert self._deadline is not None
        self._deadline.cancel()
        self.name = name
        self._listener.named(self, name)
        self.write(frame(WELCOME))
        self._heartbeat = Heartbeat(self.write, self.abort)


def _fail(inboxes: list[Inbox], replica: str | None) -> None:
    for inbox in inboxes:
        inbox.fail(ReplicaLost(_LOST, replica))
