"""Clients that send or read slowly, or not at all, hold their places for a bounded time."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.server import ServerState

from loray.bases.registry import BaseModel
from loray.spec import ServeSpec
from serve_apps import http
from serve_apps.gateway.gateway import Gateway
from serve_apps.standalone import server
from serve_apps.standalone import server as protocol
from serve_apps.standalone.server import BoundedProtocol
from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.gateway.scripted import ScriptedEngines, gateway_app

ANSWER_BYTES = 100 * (16 << 10)
SOON_S = 0.2  # in place of the limits
WAIT_S = 30.0  # in which what must happen soon has happened


def post(num_bytes: int) -> bytes:
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % num_bytes
    )


@asynccontextmanager
async def listening(app: ASGIApp) -> AsyncIterator[tuple[str, int]]:
    """Serves with the connections of `loray serve`, without its signals."""
    config = uvicorn.Config(app, lifespan="off", log_config=None, ws="none", access_log=False)
    state = ServerState()
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
    listener.bind(("127.0.0.1", 0))
    server.bound_silence(listener)
    served = await asyncio.get_running_loop().create_server(
        lambda: BoundedProtocol(config, server_state=state, app_state={}), sock=listener
    )
    try:
        yield listener.getsockname()
    finally:
        served.close()
        for connection in list(state.connections):
            connection.transport.abort()
        await served.wait_closed()
        await asyncio.gather(*state.tasks, return_exceptions=True)


async def answer_of(reader: asyncio.StreamReader) -> bytes:
    """All until the server has ended the connection."""
    async with asyncio.timeout(WAIT_S):
        return await reader.read()


def test_a_body_that_does_not_come_is_given_up_and_its_place_is_free(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "BODY_S", SOON_S)
    engines = ScriptedEngines()
    app = gateway_app(tiny_base(), sqlite_catalog(tmp_path), engines)
    gateway: Gateway = app.state.gateway

    async def run() -> None:
        async with app.router.lifespan_context(app), listening(app) as address:
            clients = [await asyncio.open_connection(*address) for _ in range(20)]
            for _, writer in clients:
                writer.write(post(1000) + b"x")
            for reader, _ in clients:
                answer = await answer_of(reader)
                assert answer.startswith(b"HTTP/1.1 408 ")
                assert b'"code":"request_timeout"' in answer
            assert gateway.turns._fair._num == 0
            for _, writer in clients:
                writer.close()

    asyncio.run(run())
    assert not engines.requests


def test_a_body_that_comes_slowly_but_steadily_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: 64 KiB that come in four minutes are too slow, and in one they are not."""

    async def read(seconds_a_part: float) -> int:
        loop = asyncio.get_running_loop()
        now = loop.time()
        monkeypatch.setattr(loop, "time", lambda: now, raising=False)
        status = 0

        async def receive() -> Message:
            nonlocal now
            now += seconds_a_part
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            return {"type": "http.request", "body": b"x" * 4096, "more_body": now < begun + 16 * seconds_a_part}

        async def send(message: Message) -> None:
            pass

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            while (await receive())["more_body"]:
                pass

        begun = now
        limited = http.BodyLimit(app, max_bytes=lambda _: 1 << 20, advice="")
        try:
            await limited({"type": "http", "headers": []}, receive, send)
        except http.HTTPException as e:
            status = e.status_code
        return status

    assert asyncio.run(read(1.9)) == 0
    assert asyncio.run(read(15.0)) == 408


def test_headers_that_do_not_come_end_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEADERS_S", SOON_S)
    release = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def run() -> None:
        async with listening(app) as address:
            for sent in (b"", b"POST /v1/comp"):
                reader, writer = await asyncio.open_connection(*address)
                writer.write(sent)
                assert await answer_of(reader) == b""
                writer.close()
            # The time for headers is none for the answer, nor for the pause until the next request.
            reader, writer = await asyncio.open_connection(*address)
            writer.write(post(0))
            other, silent = await asyncio.open_connection(*address)
            assert await answer_of(other) == b""
            silent.close()
            release.set()
            async with asyncio.timeout(WAIT_S):
                assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 ")
                writer.write(b"GET / HTTP")
                assert await reader.read() == b""
            writer.close()

    asyncio.run(run())


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux' kernel ends such connections")
@pytest.mark.parametrize("reads", [False, True], ids=["never", "slowly"])
def test_a_client_that_takes_nothing_of_its_answer_loses_its_connection(
    monkeypatch: pytest.MonkeyPatch, reads: bool
) -> None:
    monkeypatch.setattr(server, "SEND_S", 2.0)
    ended = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"connection", b"close"), (b"content-length", b"%d" % ANSWER_BYTES)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(100):
            await send({"type": "http.response.body", "body": b"x" * (ANSWER_BYTES // 100), "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        ended.set()

    async def run() -> int:
        loop = asyncio.get_running_loop()
        async with listening(app) as address, asyncio.timeout(WAIT_S):
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
                client.setblocking(False)
                await loop.sock_connect(client, address)
                await loop.sock_sendall(client, post(0))
                if not reads:
                    await ended.wait()
                num_bytes = 0
                with suppress(ConnectionResetError):
                    while data := await loop.sock_recv(client, 32 << 10):
                        num_bytes += len(data)
                        if reads and not ended.is_set():
                            with suppress(TimeoutError):  # the pace at which it reads
                                await asyncio.wait_for(ended.wait(), 0.1)
                return num_bytes

    assert (asyncio.run(run()) > ANSWER_BYTES) == reads


def test_a_request_ends_after_an_hour_at_most() -> None:
    assert ServeSpec().request_timeout_s == 3600
