"""A gateway's listener and a replica's connections in one event loop, asyncio's or uvloop's."""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import uvloop

from loray.encryption import client_context, server_context
from loray.policy.routing import Held
from loray.spec import FinishReason, TokenLogprobs
from serve_apps.channel.connection import Connections
from serve_apps.channel.inbox import Inbox
from serve_apps.channel.listener import Listener
from tests.fixtures.authority import Authority

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
NODE = "node"
ENCRYPTED = "another with TLS"
PLACES = pytest.mark.parametrize("node", [NODE, "another"])
LINKS = pytest.mark.parametrize("node", [NODE, "another", ENCRYPTED])


class Out(NamedTuple):
    """One step's result for one request, as the channel takes it."""

    token_id: int | None
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


class Plane(NamedTuple):
    gateway: Listener
    replica: Connections


@asynccontextmanager
async def plane(
    *, node: str = NODE, held: Callable[[], Held] = Held, late: Callable[[float], None] = lambda _: None
) -> AsyncIterator[Plane]:
    """`node`: the replica's; on another one than the gateway it connects over TCP, on ENCRYPTED with TLS. `held`: the
    adapters that it has; `late`: the Listener's. At the end nothing is left.
    """
    before = asyncio.all_tasks()
    server, client = contexts() if node == ENCRYPTED else (None, None)
    gateway, replica = Listener(late=late), Connections(node, "replica", held, client)
    await gateway.start(NODE, "127.0.0.1", server)
    try:
        yield Plane(gateway, replica)
    finally:
        replica.close()
        await until(lambda: not gateway._all)
        await gateway.close()
    assert [*gateway._peers, *gateway._inboxes, *gateway._sources, *gateway._reporters] == []
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


@functools.cache
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A gateway's and a replica's, of one authority."""
    with TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        found = server_context(authority.node("127.0.0.1")), client_context(authority.node("127.0.0.1"))
    assert found[0] is not None
    assert found[1] is not None
    return found[0], found[1]


async def everything(inbox: Inbox) -> list[int]:
    """All tokens up to the last one."""
    tokens: list[int] = []
    while True:
        delta = await inbox.take()
        tokens += delta.token_ids
        if delta.finish_reason is not None:
            return tokens


async def until(what: Callable[[], bool]) -> None:
    """Waits for another end of a socket in this event loop."""
    async with asyncio.timeout(60):
        while not what():
            await asyncio.sleep(0.001)


async def ended(sock: socket.socket) -> None:
    """Reads until the other side has closed the connection, or reset it as it had not read everything."""
    loop = asyncio.get_running_loop()
    with suppress(ConnectionError):
        while await loop.sock_recv(sock, 1000):
            pass
    sock.close()


def go(test: Callable[[], Coroutine[Any, Any, None]], loop: str = "asyncio") -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(asyncio.wait_for(test(), timeout=120))
