"""The HTTP server of `loray serve`: uvicorn, whose end lets requests under way end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from loray.errors import EngineError
from serve_apps.deployment import DRAIN_S
from serve_apps.standalone.app import Site
from serve_apps.standalone.protocol import BoundedProtocol

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_KEEP_ALIVE_S = 75  # longer than clients and load balancers keep idle connections, so that they close them first
SEND_S = 60.0  # in which a client takes a byte of what it is sent
_TICKS_PER_CHECK = 10  # of uvicorn's main loop, ten a second


class Server(uvicorn.Server):
    """Serves until SIGINT or SIGTERM. Then it takes no more requests, and waits up to DRAIN_S for those under way; a
    second signal ends them. It also ends, with `failure`, when the engine has stopped.

    check_health  raises EngineError if the engine has stopped
    started       called once the server answers
    stopping      called with the number of requests under way when the first signal comes
    """

    def __init__(
        self,
        site: Site,
        *,
        check_health: Callable[[], None],
        started: Callable[[], None],
        stopping: Callable[[int], None],
    ) -> None:
        config = uvicorn.Config(
            site,
            loop="uvloop",
            http=BoundedProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(DRAIN_S),
        )
        super().__init__(config)
        self.failure: EngineError | None = None
        self._check_health, self._on_started, self._on_stopping = check_health, started, stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for sock in sockets or ():
            bound_silence(sock)
        await super().startup(sockets)
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()  # which uvicorn leaves out after a second signal

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS_PER_CHECK == 0:
            try:
                self._check_health()
            except EngineError as e:
                self.failure = e
                return True
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Replaces uvicorn's, which raises the signals again at the end, and whose second SIGTERM changes nothing."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        if not self.should_exit:
            self.should_exit = True
            self._on_stopping(len(self.server_state.tasks))
            return
        self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # its request is cancelled as if the client had left


def bound_silence(listener: socket.socket) -> None:
    """Ends the connections of a listener whose clients take nothing for SEND_S. Only Linux' kernel can; elsewhere
    requests end after `request_timeout_s`.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SEND_S))
