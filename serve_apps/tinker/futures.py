"""Results that are not there yet: what the front itself computes, by the ids of the requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loray.errors import LorayError, Overloaded, RequestError
from loray.schemas.tinker.results import failed
from loray.telemetry import get_logger

_log = get_logger(__name__)

POLL_S = 20.0  # that a client's question for a result waits; clients give up after 45
KEPT_S = 3600.0  # a result, from its coming on
MOST_OPEN = 1000  # samples of a tenant
Answer = Mapping[str, Any] | bytes  # JSON, or protobuf


@dataclass(eq=False)
class Future:
    """One request under way, or its answer.

    asked   what the request asks for, which the same id always does
    state   as `try_again` says it, and `reason`
    """

    tenant: str
    asked: object
    state: str = "active"
    reason: str | None = None
    task: asyncio.Task[Answer] | None = None
    done_at: float | None = None

    async def wait(self, timeout_s: float) -> Answer | None:
        """Return the answer, which may tell of a failure; None: it has not come in that time."""
        assert self.task is not None
        done, _ = await asyncio.wait([self.task], timeout=timeout_s)
        if not done:
            return None
        if self.task.cancelled():
            return {"error": "the request was cancelled", "category": "user"}
        error = self.task.exception()
        if error is None:
            return self.task.result()
        return failed(error if isinstance(error, Exception) else RuntimeError(str(error)))


Work = Callable[[Future], Awaitable[Answer]]


@dataclass
class Futures:
    """The requests that this process answers, by id. Used from one event loop; none of them holds a thread."""

    clock: Callable[[], float] = time.monotonic
    _futures: dict[str, Future] = field(default_factory=dict)
    _num_open: dict[str, int] = field(default_factory=dict)

    def find(self, request_id: str, tenant: str) -> Future | None:
        future = self._futures.get(request_id)
        return future if future is not None and future.tenant == tenant else None

    def start(self, request_id: str, tenant: str, asked: object, work: Work, most: int | None = None) -> Future:
        """Begin the work, unless a request of this id has begun. Raises RequestError where that asked for something
        else, and Overloaded where the tenant has `most` open ones.
        """
        known = self.find(request_id, tenant)
        if known is not None:
            if known.asked != asked:
                raise RequestError(f"request {request_id} was sent before with another body; count seq_id on", "seq_id")
            return known
        self._forget()
        if most is not None and self._num_open.get(tenant, 0) >= most:
            raise Overloaded(f"tenant {tenant} has {most:,} requests under way; wait for some of them", 1.0)
        future = self._futures[request_id] = Future(tenant, asked)
        self._num_open[tenant] = self._num_open.get(tenant, 0) + 1
        future.task = asyncio.create_task(self._run(future, work))
        future.task.add_done_callback(lambda _: self._ended(future))
        return future

    def cancel(self, request_id: str, tenant: str) -> None:
        future = self.find(request_id, tenant)
        if future is not None and future.task is not None:
            future.task.cancel()

    def close(self) -> None:
        for future in self._futures.values():
            if future.task is not None:
                future.task.cancel()

    async def _run(self, future: Future, work: Work) -> Answer:
        try:
            return await work(future)
        except LorayError:
            raise
        except Exception:
            _log.exception("a request of Tinker's protocol has failed")
            raise

    def _ended(self, future: Future) -> None:
        future.done_at = self.clock()
        self._num_open[future.tenant] -= 1
        if not self._num_open[future.tenant]:
            del self._num_open[future.tenant]

    def _forget(self) -> None:
        """Forget the oldest answers; ids are in the order of their beginning."""
        before = self.clock() - KEPT_S
        for request_id, future in list(self._futures.items()):
            if future.done_at is None or future.done_at > before:
                return
            del self._futures[request_id]
