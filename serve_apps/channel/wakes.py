"""Wakes readers of streams, a few at a time."""

from __future__ import annotations

import asyncio
from collections import deque

MOST = 8  # in one pass of the event loop; each writes an event, which takes up to 60 µs


class Wakes:
    """Wakes readers in turn.

    An engine's step has tokens for all of its streams. If all their readers ran in one pass of the event loop, whatever
    else is there would wait for them in each pass, and a request takes a dozen passes to its engine.

    Who waits for a first token is woken at once; of others at most MOST in a pass, in turn. What arrives for a reader
    until its turn is in the same delta. Used from one event loop.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._left = MOST
        self._is_due = False  # the next pass is looked at

    def wake(self, reader: asyncio.Future[None], *, is_first: bool) -> None:
        if is_first:
            reader.set_result(None)
        elif self._left:
            self._left -= 1
            reader.set_result(None)
            self._look_again()
        else:
            self._waiting.append(reader)

    def _look_again(self) -> None:
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._pass)

    def _pass(self) -> None:
        self._is_due, self._left = False, MOST
        while self._waiting and self._left:
            reader = self._waiting.popleft()
            if not reader.done():  # it may have left
                self._left -= 1
                reader.set_result(None)
        if self._left < MOST:
            self._look_again()
