"""A replica tells a gateway which adapters it holds."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

from loray.serving.routing_report import Held, RoutingSeries
from serve_apps.channel.frames import pack_delta

PERIOD_S = 5.0  # the router remembers what it has sent since


class Reporting:
    """Sends everything at once, then every period what has changed, if anything has. One for each connection.

    That the replica still lives, the connection's heartbeat says.
    """

    def __init__(self, held: Callable[[], Held], write: Callable[[bytes], object]) -> None:
        self._held, self._write = held, write
        self._series = RoutingSeries(secrets.token_hex(8))
        self._report()

    def again(self) -> None:
        """The gateway has missed something."""
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
