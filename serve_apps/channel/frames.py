"""Frames, as both ends of a connection read and write them; the address of a gateway, and the heartbeat.

    HELLO    replica   the connection's name, REPLICA#NUMBER; after the token
    WELCOME  gateway   the connection stands
    TOKENS   replica   [(stream, token, finish reason, cached tokens), …] of one step, or of several for a stream that
                       nobody reads along
    SCORED   replica   [(stream, token, finish reason, cached tokens, logprobs), …], as TOKENS
    PROMPT   replica   stream, [logprobs, …]: a part of the prompt's, as it is computed, before the first token
    EMBEDDED replica   stream, the prompt's embedding as little-endian floats of four bytes, before its finish reason
    END      gateway   stream, "stop" or "abort": no more tokens are wanted
    ALIVE    both      every few seconds
    REPORT   replica   series, number, whether it is the whole, pool, host, gone: the adapters that it holds; prefixes
                       that it holds, and those that are gone
    AGAIN    gateway   a report was missed: the whole, please
    SENT     replica   its clock, in seconds, when what follows was sent: tokens
    LOAD     replica   how many streams of other gateways it has

`logprobs` are (logprob, rank, [token, …], [logprob, …]), the latter two of the best tokens. A stream is one attempt of
one request; the gateway gives it a number that nobody can guess, and takes its frames from one connection. `pool`,
`host` and `gone` are the eight bytes of each adapter's routing key, prefixes those of their names.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import msgpack

from loray.policy.routing import KEY_DIGITS, RoutingDelta
from loray.sockets import abstract
from loray.spec import FinishReason, TokenLogprobs

HELLO, WELCOME, TOKENS, SCORED, PROMPT, END, ALIVE, REPORT, AGAIN, SENT, LOAD, EMBEDDED = range(12)
MAX_FRAME = 1 << 20
TOKEN_BYTES = 64  # of an address
PERIOD_S = 5.0  # of the heartbeat
_MAX_SILENT = 4  # periods
_HEADER = struct.Struct("<I")
_PER_FRAME = 1024  # items, each of at most 800 bytes
_PER_PART = 512  # items of a prompt, between which others' tokens go


class FrameError(Exception):
    """Something came over a connection that is no frame."""


class Output(Protocol):
    """One step's result for one request, as the engine gives it."""

    @property
    def token_id(self) -> int | None: ...
    @property
    def finish_reason(self) -> FinishReason | None: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def logprobs(self) -> TokenLogprobs | None: ...
    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs, ...] | None: ...
    @property
    def embedding(self) -> tuple[float, ...] | None: ...


def frame(kind: int, *fields: Any) -> bytes:
    body: bytes = msgpack.packb((kind, *fields))
    if len(body) > MAX_FRAME:
        raise FrameError(f"a frame of {len(body)} bytes")
    return _HEADER.pack(len(body)) + body


def pack(outputs: Iterable[tuple[int, Output]]) -> bytes:
    """Pack one step's results, each with its stream, without the log-probabilities of prompts."""
    plain: list[tuple[Any, ...]] = []
    scored: list[tuple[Any, ...]] = []
    frames: list[bytes] = []
    for stream, out in outputs:
        if out.embedding is not None:
            frames.append(frame(EMBEDDED, stream, struct.pack(f"<{len(out.embedding)}f", *out.embedding)))
        item = (stream, out.token_id, out.finish_reason, out.num_cached_tokens)
        if out.logprobs is None:
            plain.append(item)
        else:
            scored.append((*item, _logprobs(out.logprobs)))
    for kind, items in ((TOKENS, plain), (SCORED, scored)):
        frames += [frame(kind, items[i : i + _PER_FRAME]) for i in range(0, len(items), _PER_FRAME)]
    return b"".join(frames)


def parts(stream: int, output: Output) -> Iterator[bytes]:
    """Pack one result with its prompt's log-probabilities, as frames one after the other. Each is packed when it is
    asked for.
    """
    prompt = iter(output.prompt_logprobs or ())
    while part := [_logprobs(lp) for lp in islice(prompt, _PER_PART)]:
        yield frame(PROMPT, stream, part)
    yield pack([(stream, output)])


class FrameReader:
    """Makes frames of a connection's bytes as they come."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Any, ...]]:
        """Yield the frames that are complete now: (kind, *fields). Raises FrameError where something else came."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _HEADER.size:
                (length,) = _HEADER.unpack_from(self._buffer, start)
                if length > MAX_FRAME:
                    raise FrameError(f"a frame of {length} bytes")
                body = start + _HEADER.size
                if len(self._buffer) < body + length:
                    break
                start = body + length
                yield _unpacked(bytes(memoryview(self._buffer)[body:start]))
        finally:
            del self._buffer[:start]


def unpack_logprobs(packed: Sequence[Any]) -> TokenLogprobs:
    logprob, rank, ids, values = packed
    return TokenLogprobs(logprob, tuple(zip(ids, values, strict=True)), rank)


def unpack_embedding(packed: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(packed) // 4}f", packed)


def pack_delta(delta: RoutingDelta) -> bytes:
    kinds = (delta.in_pool, delta.on_host, delta.gone, delta.prefixes, delta.prefixes_gone)
    keys = (bytes.fromhex("".join(kind)) for kind in kinds)
    return frame(REPORT, delta.series, delta.number, delta.is_whole, *keys)


def unpack_delta(fields: Sequence[Any]) -> RoutingDelta:
    """Read a report. Raises ValueError or TypeError if the fields are not a delta's."""
    series, number, is_whole, *kinds = fields
    if not isinstance(series, str) or not isinstance(number, int) or not isinstance(is_whole, bool):
        raise TypeError("a report without its number")
    in_pool, on_host, gone, prefixes, prefixes_gone = map(_keys, kinds)
    return RoutingDelta(series, number, is_whole, in_pool, on_host, gone, prefixes, prefixes_gone)


def _keys(packed: bytes) -> tuple[str, ...]:
    digits = bytes.hex(packed)
    if len(digits) % KEY_DIGITS:
        raise ValueError("half a routing key")
    return tuple(digits[i : i + KEY_DIGITS] for i in range(0, len(digits), KEY_DIGITS))


def _logprobs(logprobs: TokenLogprobs) -> tuple[Any, ...]:
    return (logprobs.logprob, logprobs.rank, [t for t, _ in logprobs.top], [lp for _, lp in logprobs.top])


def _unpacked(body: bytes) -> tuple[Any, ...]:
    try:
        fields = msgpack.unpackb(body, use_list=False)
    except (ValueError, msgpack.UnpackException) as e:
        raise FrameError("not msgpack") from e
    if not isinstance(fields, tuple) or not fields:
        raise FrameError("no kind")
    return fields


@dataclass(frozen=True, slots=True)
class ChannelAddress:
    """The address of one gateway process.

    node   Ray's id of the gateway's node
    name   of its socket in Linux' abstract namespace, which leaves no file behind
    token  64 ASCII characters that begin every connection
    """

    node: str
    name: str
    host: str
    port: int
    token: str = field(repr=False)


async def dial(address: ChannelAddress, node: str) -> socket.socket:
    """Open a non-blocking connection to the gateway from a process on `node`. Raises OSError."""
    local = address.node == node
    family = socket.AF_UNIX if local else (socket.AF_INET6 if ":" in address.host else socket.AF_INET)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        target = abstract(address.name) if local else (address.host, address.port)
        await asyncio.get_running_loop().sock_connect(sock, target)
        if not local:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # tokens are sent at once
    except BaseException:
        sock.close()
        raise
    return sock


class Heartbeat:
    """Sends a frame every period, and calls `gone`, once, when nothing has come for longer than four of them.

    The kernel would say that the other side takes what is sent; so would its kernel while its process hangs, or a proxy
    between both. Periods are those in which this event loop runs: after a pause of its own process it reads first.
    """

    def __init__(self, write: Callable[[bytes], object], gone: Callable[[str], None]) -> None:
        self._write, self._gone = write, gone
        self._num_silent = 0
        self._timer = asyncio.get_running_loop().call_later(PERIOD_S, self._beat)

    def heard(self) -> None:
        """Note that something has come."""
        self._num_silent = 0

    def stop(self) -> None:
        self._timer.cancel()

    def _beat(self) -> None:
        if self._num_silent == _MAX_SILENT:
            self._gone(f"nothing came for {PERIOD_S * _MAX_SILENT:g} s")
            return
        self._num_silent += 1
        self._timer = asyncio.get_running_loop().call_later(PERIOD_S, self._beat)
        self._write(frame(ALIVE))
