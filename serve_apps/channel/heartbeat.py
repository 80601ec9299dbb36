"""Whether the other side of a connection is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serve_apps.channel.frames import ALIVE, frame

PERIOD_S = 5.0
_MAX_SILENT = 4  # periods

_BEAT = frame(ALIVE)


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
        """Something has come."""
        self._num_silent = 0

    def stop(self) -> None:
        self._timer.cancel()

    def _beat(self) -> None:
        if self._num_silent == _MAX_SILENT:
            self._gone(f"nothing came for {PERIOD_S * _MAX_SILENT:g} s")
            return
        self._num_silent += 1
        self._timer = asyncio.get_running_loop().call_later(PERIOD_S, self._beat)
        self._write(_BEAT)
