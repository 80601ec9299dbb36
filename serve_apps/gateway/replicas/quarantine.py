"""A deployment's quarantine: each gateway's own, and the catalog's record of deaths, which all of them share.

A gateway records a death before it sends the request again or answers it. Before it sends a request for an adapter of
which it has seen no token yet, it reads what is recorded: an adapter costs a deployment one replica, not one for each
gateway. Requests for other adapters ask nothing. Without the catalog each gateway goes on alone.

An ephemeral adapter is soon replaced, and its trainer is told of each death: none of it is recorded. It only shares the
suspicion with the others that were on the replica.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from loray.catalog import Catalog, Quarantined
from loray.errors import LorayError
from loray.policy.quarantine import TRIAL_S, Death, Quarantine, Suspicion, being_tried
from loray.telemetry import get_logger

_log = get_logger(__name__)
T = TypeVar("T")

_TIMEOUT_S = 1.0  # of one question to the catalog
_DEATH_TIMEOUT_S = 10.0  # of a death's record, which others wait for
_AWAY_S = 5.0  # after a question that failed, before the next one


class SharedQuarantine:
    """The quarantine of one gateway, used from one event loop. `open_catalog` None: alone, it forgets at its end."""

    def __init__(
        self, open_catalog: Callable[[], Catalog] | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._open, self._clock = open_catalog, clock
        self._catalog: Catalog | None = None
        self._known = Quarantine()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="quarantine")
        self._asking = asyncio.Lock()
        self._reading = asyncio.Lock()
        self._read_at = float("-inf")  # when the last read began
        self._away_until = float("-inf")
        self._asked: asyncio.Future[object] | None = None
        self._behind: set[asyncio.Task[object]] = set()  # what no request waits for

    async def enter(self, request_id: str, digest: str, *, is_ephemeral: bool = False) -> None:
        """Let a request for `digest` be sent. Raises AdapterQuarantined where it must not be."""
        if self._open is not None and not is_ephemeral and not self._known.is_good(digest):
            await self._read()
            now = self._clock()
            if self._known.is_due(digest, now):
                until = _time(now + TRIAL_S)
                if await self._ask(lambda catalog: catalog.quarantine.try_again(digest, _time(now), until)) is False:
                    raise being_tried(digest)
        self._known.enter(request_id, digest, self._clock())

    def leave(self, request_id: str) -> None:
        self._known.leave(request_id)

    def answered(self, digest: str) -> None:
        """Note that a token computed with the adapter has come."""
        if self._known.answered(digest) and self._open is not None:
            self._later(lambda catalog: catalog.quarantine.clear(digest))

    async def died(
        self,
        request_id: str,
        replica: str,
        where: Callable[[str], str | None],
        is_held: Callable[[str], bool],
        among: Collection[str] | None = None,
    ) -> None:
        """The replica died with this request; see Quarantine. Other gateways know of it when this returns."""
        death = self._known.died(request_id, replica, where, is_held, among)
        if death is None:
            return
        at = self._clock()
        self._known.count(death, at)
        if self._open is not None:
            self._away_until = float("-inf")
            noted = await self._ask(
                lambda catalog: catalog.quarantine.report_death(
                    death.digest, replica, _time(at), lambda n: _refused_for(death, n)
                ),
                _DEATH_TIMEOUT_S,
            )
            if noted is not None:
                self._known.learn({**self._known.suspects, death.digest: _suspicion(noted)})

    async def close(self) -> None:
        await asyncio.gather(*self._behind, return_exceptions=True)
        if self._catalog is not None:
            await self._ask(lambda catalog: catalog.close())
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _read(self) -> None:
        """Return after a read that began later than this call. Concurrent calls share one."""
        called_at = time.monotonic()
        async with self._reading:
            if self._read_at >= called_at:
                return
            self._read_at = time.monotonic()
            rows = await self._ask(lambda catalog: catalog.quarantine.all())
            if rows is None:
                return
            for innocent in self._known.learn({digest: _suspicion(row) for digest, row in rows.items()}):
                self._later(lambda catalog, digest=innocent: catalog.quarantine.acquit(digest))  # type: ignore[misc]

    def _later(self, question: Callable[[Catalog], object]) -> None:
        task: asyncio.Task[object] = asyncio.create_task(self._ask(question))
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)

    async def _ask(self, question: Callable[[Catalog], T], timeout_s: float | None = None) -> T | None:
        """Ask the catalog in a thread; None while it cannot be asked."""
        async with self._asking:
            is_stuck = self._asked is not None and not self._asked.done()
            if is_stuck or time.monotonic() < self._away_until:
                return None
            asked = asyncio.get_running_loop().run_in_executor(self._thread, self._answer, question)
            self._asked = asked  # type: ignore[assignment]
            try:
                async with asyncio.timeout(timeout_s or _TIMEOUT_S):
                    return await asyncio.shield(asked)
            except (LorayError, TimeoutError) as e:
                if self._away_until == float("-inf"):
                    _log.warning("the adapters on which replicas died are not shared with other gateways: %r", e)
                self._away_until = time.monotonic() + _AWAY_S
                return None

    def _answer(self, question: Callable[[Catalog], T]) -> T:
        if self._catalog is None:
            assert self._open is not None
            self._catalog = self._open()
        return question(self._catalog)


def _suspicion(row: Quarantined) -> Suspicion:
    return Suspicion(row.deaths, None if row.refused_until is None else row.refused_until.timestamp(), row.replica)


def _refused_for(death: Death, deaths: int) -> timedelta | None:
    seconds = death.refused_s(deaths)
    return None if seconds is None else timedelta(seconds=seconds)


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
