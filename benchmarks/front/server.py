"""The process under test: a gateway on engines that compute nothing, or the least that a server of events does.

    python -m benchmarks.front.server '{"kind": "gateway", "base": "smollm2", "home": HOME, "folder": FOLDER,
        "interval_s": 0.0}'

`kind`: "gateway", with its engines in process; "channel", with its engines in another process; "floor"; "replica", the
other process of "channel". It prints its port when it answers, and ends when its input ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import uvicorn
import uvloop
from prometheus_client.core import Metric as Family

from loray.bases.registry import get_base
from loray.engine.request import TokenOutput
from loray.schemas.status import AutoscalingStatus, ReplicaStatus
from loray.settings import Settings
from loray.spec import GenerateRequest, ServeSpec, TokenDelta
from serve_apps.auth import open_auth
from serve_apps.channel.connection import connect
from serve_apps.channel.frames import ChannelAddress
from serve_apps.channel.inbox import Inbox
from serve_apps.channel.listener import Listener
from serve_apps.gateway.app import create_app
from serve_apps.gateway.bases import PromptEncoder, ServedBase
from serve_apps.gateway.directory import ModelResolver
from serve_apps.gateway.gateway import Gateway

T = TypeVar("T")
_NODE = "front"
_TEXT = (
    "The engine makes tokens and the gateway writes them as events, each with its text, until the last one has come."
)
# An event of the gateway, of the same length.
_EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1790000000,'
    b'"model":"smollm2","system_fingerprint":"loray-0.1.0-0123456789ab","choices":[{"index":0,"text":" tokens",'
    b'"logprobs":null,"finish_reason":null}]}\n\n'
)
_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Steps(Generic[T]):
    """Each step gives every member one token. It begins `interval_s` after the one before, and not before every token
    of that one has been taken: so it never runs ahead of who reads.

    begin  gives each of these members a token
    """

    def __init__(self, interval_s: float, begin: Callable[[list[T]], None]) -> None:
        self._interval_s, self._begin = interval_s, begin
        self._members: dict[T, bool] = {}  # True: it has not taken its token of this step
        self._num_open = 0
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def join(self, member: T) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        self._members[member] = False
        self._changed.set()

    def leave(self, member: T) -> None:
        self.taken(member)
        del self._members[member]

    def taken(self, member: T) -> None:
        if self._members[member]:
            self._members[member] = False
            self._num_open -= 1
            if not self._num_open:
                self._changed.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            while self._num_open or not self._members:
                self._changed.clear()
                await self._changed.wait()
            due = max(due + self._interval_s, loop.time())
            if (wait_s := due - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            self._members = dict.fromkeys(self._members, True)
            self._num_open = len(self._members)
            self._begin(list(self._members))


class FakeEngines:
    """Implements `serve_apps.gateway.bases.Engines`: every request that runs gets one token a step, of `token_ids`
    again and again.
    """

    def __init__(self, token_ids: Sequence[int], interval_s: float) -> None:
        self._token_ids, self._interval_s = token_ids, interval_s
        self._steps: Steps[asyncio.Queue[None]] | None = None

    async def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        def put(queues: list[asyncio.Queue[None]]) -> None:
            for each in queues:
                each.put_nowait(None)

        steps = self._steps = self._steps or Steps(self._interval_s, put)
        queue: asyncio.Queue[None] = asyncio.Queue()
        last = request.params.max_tokens - 1
        steps.join(queue)
        try:
            for i in range(last + 1):
                await queue.get()
                steps.taken(queue)
                yield TokenDelta((self._token_ids[i % len(self._token_ids)],), "length" if i == last else None)
        finally:
            steps.leave(queue)

    def running(self, late: Callable[[float], None]) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def healthy(self) -> bool:
        return True

    async def stats(self) -> list[ReplicaStatus]:
        return []

    async def retire(self, digests: Collection[str]) -> None:
        pass

    async def autoscaling(self) -> AutoscalingStatus | None:
        return None

    async def metrics(self) -> list[list[Family] | None]:
        return []

    def is_cold(self) -> bool:
        return False

    def start_failed(self) -> bool:
        return False

    def routing_decisions(self) -> Mapping[str, int]:
        return {}

    def resumes(self) -> Mapping[str, int]:
        return {}

    def close(self) -> None:
        """Ends what the engines have started."""


class ChannelEngines(FakeEngines):
    """The same with an engine in another process, whose tokens come over the channel of `loray up`, one frame a step.

    That process hears of requests and steps over a pipe, in the place of Ray Serve's call.
    """

    def __init__(self, token_ids: Sequence[int], interval_s: float) -> None:
        super().__init__(token_ids, interval_s)
        self._listener = Listener()
        self._replica: subprocess.Popen[bytes] | None = None
        self._inbox_steps: Steps[Inbox] = Steps(interval_s, lambda _: self._tell("step"))
        self._starting: asyncio.Task[None] | None = None

    async def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        self._starting = self._starting or asyncio.create_task(self._start())
        await asyncio.shield(self._starting)
        inbox = self._listener.open()
        self._tell(f"{inbox.stream} {request.params.max_tokens}")
        self._inbox_steps.join(inbox)
        try:
            while True:
                delta = await inbox.take()
                self._inbox_steps.taken(inbox)
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._inbox_steps.leave(inbox)
            self._listener.forget(inbox, "abort")

    async def _start(self) -> None:
        await self._listener.start(_NODE, "127.0.0.1")
        setup = {"kind": "replica", "address": asdict(self._listener.address), "token_ids": list(self._token_ids)}
        command = [sys.executable, "-m", "benchmarks.front.server", json.dumps(setup)]
        self._replica = subprocess.Popen(command, stdin=subprocess.PIPE)

    def _tell(self, line: str) -> None:
        assert self._replica is not None
        assert self._replica.stdin is not None
        os.write(self._replica.stdin.fileno(), f"{line}\n".encode())

    def close(self) -> None:
        if self._replica is not None:
            assert self._replica.stdin is not None
            self._replica.stdin.close()
            self._replica.wait()


async def _replica(address: ChannelAddress, token_ids: Sequence[int], ended: asyncio.Event) -> None:
    """An engine that computes nothing, with a replica's end of the channel. Each line of its input is a new stream and
    its number of tokens, or "step": a token of every stream in one frame.
    """
    connection = await connect(address, _NODE, "front#0")
    left: dict[int, int] = {}  # tokens, by stream
    rest = b""

    def drop(stream: int, reason: object = None) -> None:
        left.pop(stream, None)

    def step() -> None:
        outputs = []
        for stream, num in list(left.items()):
            token = token_ids[num % len(token_ids)]
            outputs.append((stream, TokenOutput(str(stream), token, None, "length" if num == 1 else None)))
            left[stream] = num - 1
            if num == 1:
                connection.unwatch(stream)
                drop(stream)
        connection.send(outputs)

    def read() -> None:
        nonlocal rest
        data = os.read(sys.stdin.fileno(), 1 << 16)
        if not data:
            ended.set()
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line == b"step":
                step()
                continue
            stream, num_tokens = map(int, line.split())
            left[stream] = num_tokens
            connection.watch(stream, partial(drop, stream))

    asyncio.get_running_loop().add_reader(sys.stdin, read)
    await ended.wait()
    connection.close()


class FloorProtocol(asyncio.Protocol):
    """The least that a server of event streams does in Python: it answers each request of its connection with
    `max_tokens` ready-made events, one a turn of the loop. It checks, tokenises and formats nothing, and has no task
    for a request.
    """

    def __init__(self) -> None:
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()
        self._chunk = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)

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
        self._transport.write(self._chunk)
        if self._left:
            self._loop.call_soon(self._step)
        else:
            self._transport.write(_END)


async def _gateway(setup: Mapping[str, Any], listener: socket.socket, ended: asyncio.Event) -> None:
    """With uvicorn's settings of `loray serve`."""
    base, folder = get_base(Path(setup["home"]), setup["base"]), setup["folder"]
    prompts = PromptEncoder.load(base)
    kind = ChannelEngines if setup["kind"] == "channel" else FakeEngines
    engines = kind(prompts.tokenizer.encode(_TEXT, special=False), setup["interval_s"])
    settings = Settings.from_env({"LORAY_HOME": folder, "LORAY_CATALOG": f"sqlite:///{folder}/front.db"})
    access = open_auth(settings, "127.0.0.1")
    served = ServedBase(ServeSpec(base=base.name), base, prompts, engines)
    app = create_app(Gateway([served], ModelResolver([base], access.follower)), access)
    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", ws="none", lifespan="on", log_level="warning", access_log=False
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not task.done():
        await asyncio.sleep(0.01)
    _say_port(listener)
    await ended.wait()
    server.should_exit = True
    await task
    engines.close()


def _say_port(listener: socket.socket) -> None:
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()


async def serve(setup: Mapping[str, Any]) -> None:
    ended = asyncio.Event()
    if setup["kind"] == "replica":
        return await _replica(ChannelAddress(**setup["address"]), setup["token_ids"], ended)
    loop, listener = asyncio.get_running_loop(), socket.create_server(("127.0.0.1", 0), backlog=1024)
    loop.add_reader(sys.stdin, ended.set)
    if setup["kind"] != "floor":
        return await _gateway(setup, listener, ended)
    server = await loop.create_server(FloorProtocol, sock=listener)
    _say_port(listener)
    await ended.wait()
    server.close()
    return None


if __name__ == "__main__":
    uvloop.run(serve(json.loads(sys.argv[1])))
