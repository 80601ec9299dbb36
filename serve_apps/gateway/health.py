"""Whether the bases can be asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from loray.errors import EngineError
from serve_apps.gateway.bases import ServedBase

FRESH_S = 1.0  # for which an answer is given again


class Health:
    """Asks the replicas at most once in FRESH_S, however many callers there are: they need no key. Used from one event
    loop.
    """

    def __init__(self, bases: Sequence[ServedBase]) -> None:
        self._bases = bases
        self._asked: asyncio.Future[list[bool]] | None = None
        self._asked_at = 0.0

    async def found(self) -> str:
        """JSON, with the number of the bases that cannot be asked. Raises EngineError if that are all of them."""
        asked, now = self._asked, asyncio.get_running_loop().time()
        if asked is None or (asked.done() and now >= self._asked_at + FRESH_S):
            asked = self._asked = asyncio.gather(*(base.healthy() for base in self._bases))
            self._asked_at = now
        num_silent = (await asyncio.shield(asked)).count(False)
        if num_silent == len(self._bases):
            raise EngineError("no replica answers; `loray status` says more")
        found = {"status": "degraded", "num_unavailable": num_silent} if num_silent else {"status": "ok"}
        return json.dumps(found, separators=(",", ":"))
