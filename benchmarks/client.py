"""Clients over HTTP: completions in an open or a closed loop, and a client in a process of its own.

On a machine without spare cores whatever a client computes for a token delays the server's next one. So answers are
noted as they come and read when all have come, and a client beside a busy server may be a process of its own:

    python -m benchmarks.client '{"mode": "count", "port": 8000, "pid": 1, "path": …, "body": {…}, "connections": 64,
        "seconds": 5}'
    python -m benchmarks.client '{"mode": "paced", "port": 8000, "path": …, "body": {…}, "rate": 50, "seconds": 5}'
    python -m benchmarks.client < a line of {"mode": "hold", "port": 8000, "key": "", "requests": …, "at_once": 200}

`count` keeps as many requests under way and counts the events of the last `seconds`; `paced` sends at a rate and times
each request; `hold` keeps as many completions under way until its standard input ends. Each prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import selectors
import socket
import subprocess
import sys
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from benchmarks.world import cpu_seconds

UNKNOWN_ID = -1  # of a token whose id the server does not send
HUNG_S = 60.0  # after which a client of `hold` gives up
_NAN = float("nan")
_END_OF_HEAD = b"\r\n\r\n"
_COMPLETIONS = "/v1/completions"


class Request(NamedTuple):
    """A completion of token ids. `at`: when it is due in an open loop, in seconds after the start."""

    at: float
    model: str
    prompt: Sequence[int]
    max_tokens: int
    streamed: bool = True
    headers: Mapping[str, str] = MappingProxyType({})


@dataclass(slots=True)
class Answer:
    """What came of one request. Times are seconds after the start of its loop.

    at      when it was due in an open loop, so that a late sending counts as latency; else when it was sent
    times, ids     of each output token
    last    when its last byte came
    status  HTTP's; 0: none came
    retry_after_s  what a refusal says, NaN: nothing
    error   why it is not a whole answer; empty: it is
    """

    at: float
    times: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    last: float = _NAN
    status: int = 0
    retry_after_s: float = _NAN
    error: str = ""

    @property
    def ttft(self) -> float:
        """NaN where no token came."""
        return self.times[0] - self.at if self.times else _NAN

    @property
    def seconds(self) -> float:
        """Until its end."""
        return self.last - self.at


async def open_loop(dues: Sequence[float], one: Callable[[int], Awaitable[None]], began: float) -> None:
    """Call `one(i)` at each due time after `began` of time.perf_counter(), whoever still waits."""

    async def timed(i: int) -> None:
        await asyncio.sleep(max(0.0, dues[i] - (time.perf_counter() - began)))
        await one(i)

    await asyncio.gather(*(timed(i) for i in range(len(dues))))


async def closed_loop(count: int, at_once: int, one: Callable[[int], Awaitable[None]]) -> None:
    """Call `one(i)` for each of `count`, so many at once; each is followed by the next."""
    todo = iter(range(count))

    async def loop() -> None:
        for i in todo:
            await one(i)

    await asyncio.gather(*(loop() for _ in range(at_once)))


async def replay(
    dues: Sequence[float], at_once: int | None, submit: Callable[[int], AsyncIterator[list[int]]]
) -> list[Answer]:
    """An open loop, or a closed one of `at_once`, over a system in this process: `submit(i)` yields the ids of new
    tokens as they come. An error ends only its request.
    """
    began = time.perf_counter()
    answers = [Answer(at) for at in dues]

    async def one(i: int) -> None:
        answer = answers[i]
        if at_once is not None:
            answer.at = time.perf_counter() - began
        try:
            async for ids in submit(i):
                answer.times += [time.perf_counter() - began] * len(ids)
                answer.ids += ids
        except Exception as e:  # noqa: BLE001 - it is the result of this request
            answer.error = f"{type(e).__name__}: {e}"
        answer.last = time.perf_counter() - began

    await (open_loop(dues, one, began) if at_once is None else closed_loop(len(dues), at_once, one))
    return answers


@dataclass(frozen=True, slots=True)
class Endpoint:
    """OpenAI's completions at a port of this machine. `key`: empty, none is sent. `options`: further fields of every
    request; `timeout_s`: after which its client gives up.
    """

    port: int
    key: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float | None = None

    def run(self, requests: Sequence[Request], at_once: int | None = None) -> tuple[float, list[Answer]]:
        """`send` in an event loop of its own."""
        return asyncio.run(self.send(requests, at_once))

    async def send(self, requests: Sequence[Request], at_once: int | None = None) -> tuple[float, list[Answer]]:
        """Send all at their times, or `at_once` of them. Returns when that began, of time.perf_counter(), and the
        answers, which are read when all have come.
        """
        began = time.perf_counter()
        answers = [Answer(request.at) for request in requests]
        received: dict[int, Received] = {}

        async def one(i: int) -> None:
            if at_once is not None:
                answers[i].at = time.perf_counter() - began
            received[i] = await self._note(requests[i], answers[i], began)

        dues = [request.at for request in requests]
        await (open_loop(dues, one, began) if at_once is None else closed_loop(len(requests), at_once, one))
        for i, request in enumerate(requests):
            self._read(received[i], request, answers[i], began)
        return began, answers

    async def ask(self, request: Request, began: float) -> Answer:
        """Send one now, and read its answer at once."""
        answer = Answer(time.perf_counter() - began)
        self._read(await self._note(request, answer, began), request, answer, began)
        return answer

    async def _note(self, request: Request, answer: Answer, began: float) -> Received:
        """What came, without reading it; nothing where `answer` has an error."""
        body: dict[str, Any] = {"model": request.model, "prompt": list(request.prompt)}
        body |= {"max_tokens": request.max_tokens, "temperature": 0, "ignore_eos": True, "stream": request.streamed}
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            async with asyncio.timeout(self.timeout_s):
                return await post(self.port, _COMPLETIONS, {**body, **self.options}, {**headers, **request.headers})
        except TimeoutError:
            answer.error, answer.last = f"no end within {self.timeout_s:.0f} s", time.perf_counter() - began
        except OSError as e:
            answer.error, answer.last = repr(e), time.perf_counter() - began
        return Received([])

    def _read(self, received: Received, request: Request, answer: Answer, began: float) -> None:
        """Write down in `answer` what has come.

        A server without token ids may send several tokens in one event. Each event then counts as one token, and the
        last event as all tokens that are missing from the request's length.
        """
        if answer.error:
            return
        answer.status, answer.retry_after_s = received.status, received.retry_after_s
        answer.last = received.parts[-1][0] - began if received.parts else time.perf_counter() - began
        try:
            finished = self._read_whole if not request.streamed else self._read_stream
            if not finished(received, request, answer, began):
                answer.error = "the stream ended before its last event"
        except (RuntimeError, ValueError, KeyError) as e:
            answer.error = f"{type(e).__name__}: {e}"

    def _read_whole(self, received: Received, request: Request, answer: Answer, began: float) -> bool:
        pieces = list(received.body())
        choice = json.loads(b"".join(data for _, data in pieces))["choices"][0]
        answer.ids = list(choice.get("token_ids") or [UNKNOWN_ID] * request.max_tokens)
        answer.times = [pieces[-1][0] - began] * len(answer.ids)
        return True

    def _read_stream(self, received: Received, request: Request, answer: Answer, began: float) -> bool:
        finished = False
        for at, event in received.events():
            for choice in event["choices"]:
                ids = list(choice.get("token_ids") or ([UNKNOWN_ID] if choice.get("text") else ()))
                if choice.get("finish_reason"):
                    finished = True
                    if "return_token_ids" not in self.options:
                        ids += [UNKNOWN_ID] * (request.max_tokens - len(answer.ids) - len(ids))
                answer.ids += ids
                answer.times += [at - began] * len(ids)
        return finished


class Received(NamedTuple):
    """An answer as it came: (time.perf_counter(), bytes) of each receipt."""

    parts: list[tuple[float, bytes]]

    @property
    def _head(self) -> list[str]:
        return b"".join(data for _, data in self.parts).partition(_END_OF_HEAD)[0].decode("latin-1").split("\r\n")

    @property
    def status(self) -> int:
        """0: none came."""
        return int(self._head[0].split()[1]) if self.parts else 0

    @property
    def retry_after_s(self) -> float:
        """In milliseconds where the server says that, which OpenAI's client prefers. NaN: the server says nothing."""
        fields = {name.lower(): value for name, _, value in (line.partition(":") for line in self._head)}
        if "retry-after-ms" in fields:
            return float(fields["retry-after-ms"]) / 1000
        return float(fields.get("retry-after", "nan"))

    def body(self) -> Iterator[tuple[float, bytes]]:
        """Pieces of the body, each with the time at which its last byte came. RuntimeError unless the status is 200."""
        raw = b"".join(data for _, data in self.parts)
        head, separator, _ = raw.partition(_END_OF_HEAD)
        if not separator:
            raise RuntimeError(f"the server closed the connection after {len(raw)} bytes")
        at = len(head) + len(separator)
        is_chunked = b"transfer-encoding: chunked" in head.lower()
        if self.status != 200:
            body = b"".join(data for _, data in _chunks(raw, at)) if is_chunked else raw[at:]
            raise RuntimeError(f"{self.status}: {body.decode(errors='replace')[:300]}")
        ends = list(accumulate(len(data) for _, data in self.parts))
        for end, data in _chunks(raw, at) if is_chunked else [(len(raw), raw[at:])]:
            yield self.parts[bisect_left(ends, end)][0], data

    def events(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """The server-sent events with the times at which they came, without comments and the closing [DONE]."""
        rest = b""
        for at, data in self.body():
            *whole, rest = (rest + data).split(b"\n\n")
            for text in whole:
                if text.startswith(b"data: ") and text != b"data: [DONE]":
                    event: dict[str, Any] = json.loads(text[6:])
                    if "error" in event:
                        raise RuntimeError(str(event["error"]))
                    yield at, event


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


async def post(port: int, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> Received:
    """POST `body` to a server of this machine, which closes the connection after its answer."""
    request = http_request(path, body, {"Connection": "close", **headers})
    transport, receiver = await asyncio.get_running_loop().create_connection(
        lambda: _Receiver(request), "127.0.0.1", port
    )
    try:
        await receiver.ended
    finally:
        transport.close()
    return Received(receiver.parts)


def http_request(path: str, body: Mapping[str, Any], headers: Mapping[str, str] = MappingProxyType({})) -> bytes:
    content = json.dumps(body).encode()
    fields = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + content


def _chunks(raw: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """(offset of its end in `raw`, data) of each chunk from `at` on."""
    while True:
        size_end = raw.find(b"\r\n", at)
        size = int(raw[at:size_end].split(b";")[0], 16) if size_end >= 0 else 0
        if size_end < 0 or size_end + 2 + size > len(raw):
            raise RuntimeError("the server closed the connection in the middle of its answer")
        if not size:
            return
        yield size_end + 2 + size, raw[size_end + 2 : size_end + 2 + size]
        at = size_end + 2 + size + 2


@contextmanager
def real_time() -> Iterator[bool]:
    """Meanwhile this thread, and processes that it starts, run as soon as they have something to do, whoever else wants
    the processors: as clients on machines of their own. Yields False, and changes nothing, where this user may not.
    """
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        yield False
        return
    try:
        yield True
    finally:
        os.sched_setscheduler(0, *before)


class _Stream:
    """One connection of `count` and `paced`, with at most one request at a time. It counts events and reads none."""

    _EVENT, _END = b"data: {", b"\r\n0\r\n\r\n"

    def __init__(self, port: int, request: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._request, self._tail = request, b""
        self.began = self.first = 0.0
        self.num_events = 0

    def send(self, began: float) -> None:
        self.began, self.first, self.num_events, self._tail = began, 0.0, 0, b""
        self.socket.sendall(self._request)

    def receive(self) -> tuple[int, bool]:
        """New events, and whether the response has ended."""
        data = self.socket.recv(1 << 18)
        if not data:
            raise SystemExit("the server closed a connection")
        if not self.first:
            if not data.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"the server answered:\n{data.decode(errors='replace')[:500]}")
            self.first = time.perf_counter()
        data = self._tail + data
        num_events = data.count(self._EVENT)
        self.num_events += num_events
        self._tail = data[-(len(self._EVENT) - 1) :]
        return num_events, data.endswith(self._END)


def count(port: int, request: bytes, pid: int, connections: int, seconds: float) -> dict[str, Any]:
    """Events, and the processor seconds of the server and of this process, in `seconds` under way, after a second."""
    selector = selectors.DefaultSelector()
    for stream in (_Stream(port, request) for _ in range(connections)):
        selector.register(stream.socket, selectors.EVENT_READ, stream)
        stream.send(time.perf_counter())
    begins_at = time.perf_counter() + 1.0
    began = cpu = own = 0.0
    found: dict[str, Any] = {}
    num_events = num_whole = num_whole_events = 0
    while not found or not num_whole:
        now = time.perf_counter()
        if not began and now >= begins_at:
            began, cpu, own, num_events = now, cpu_seconds(pid), time.process_time(), 0
        elif began and not found and now >= began + seconds:
            server, client = cpu_seconds(pid) - cpu, time.process_time() - own
            found = {"seconds": now - began, "events": num_events, "server_cpu_s": server, "client_cpu_s": client}
        for key, _ in selector.select():
            more, ended = key.data.receive()
            num_events += more
            if ended:
                num_whole += 1
                num_whole_events += key.data.num_events
                key.data.send(now)
    return found | {"events_per_response": num_whole_events / num_whole}


def paced(port: int, request: bytes, rate: float, seconds: float) -> dict[str, Any]:
    """Seconds from each request's due time to its first byte and to its end; a late sending counts as latency."""
    selector = selectors.DefaultSelector()
    free: deque[_Stream] = deque()
    first: list[float] = []
    whole: list[float] = []
    num_sent, num_requests = 0, int(rate * seconds)
    began = time.perf_counter() + 0.1
    while len(whole) < num_requests:
        due, now = began + num_sent / rate, time.perf_counter()
        if num_sent < num_requests and now >= due:
            stream = free.popleft() if free else _Stream(port, request)
            if stream.socket not in selector.get_map():
                selector.register(stream.socket, selectors.EVENT_READ, stream)
            stream.send(due)
            num_sent += 1
            continue
        for key, _ in selector.select(max(0.0, due - now) if num_sent < num_requests else None):
            if key.data.receive()[1]:
                first.append(key.data.first - key.data.began)
                whole.append(time.perf_counter() - key.data.began)
                free.append(key.data)
    return {"first_s": first, "whole_s": whole}


async def hold(endpoint: Endpoint, requests: Sequence[Request], at_once: int) -> dict[str, Any]:
    """Keep as many of the requests under way, drawn at random, until standard input ends; a refused client comes again
    after as long as the server says, as OpenAI's does. How often each status came, 0: no answer.
    """
    chance, statuses = random.Random(endpoint.port), Counter[str]()
    began, cpu_s = time.perf_counter(), time.process_time()

    async def one() -> None:
        while True:
            answer = await endpoint.ask(chance.choice(requests), began)
            statuses[str(answer.status)] += 1
            if answer.error:
                await asyncio.sleep(answer.retry_after_s if math.isfinite(answer.retry_after_s) else 1.0)

    tasks = [asyncio.create_task(one()) for _ in range(at_once)]
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    spent = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu_s}
    return {"statuses": dict(statuses), **spent}


@contextmanager
def holding(port: int, key: str, requests: Sequence[Request], at_once: int) -> Iterator[dict[str, Any]]:
    """`hold` in a process of its own during the block; the dictionary has its figures after the block."""
    listed = [[r.at, r.model, list(r.prompt), r.max_tokens] for r in requests]
    setup = {"mode": "hold", "port": port, "key": key, "requests": listed, "at_once": at_once}
    command, pipe = [sys.executable, "-m", "benchmarks.client"], subprocess.PIPE
    told: dict[str, Any] = {}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(setup) + "\n")
            process.stdin.flush()
            yield told
            said, _ = process.communicate(timeout=HUNG_S)
        finally:
            process.kill()
    told |= json.loads(said)


def main() -> None:
    setup = json.loads(sys.argv[1] if len(sys.argv) > 1 else sys.stdin.readline())
    mode, port = setup.pop("mode"), setup.pop("port")
    if mode == "hold":
        endpoint = Endpoint(port, setup["key"], timeout_s=HUNG_S)
        found = asyncio.run(hold(endpoint, [Request(*r) for r in setup["requests"]], setup["at_once"]))
    else:
        request = http_request(setup.pop("path"), setup.pop("body"), setup.pop("headers", {}))
        found = {"count": count, "paced": paced}[mode](port, request, **setup)  # type: ignore[operator]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
