"""The call of one attempt: how its replica accepts it, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentResponseGenerator

from loray.errors import BaseStarting, EngineError, LorayError, Overloaded, ReplicaLost, ReplicaUnavailable
from serve_apps.channel.inbox import Inbox
from serve_apps.channel.listener import Listener

_NO_REPLICA_S = 30.0  # usually longer than Serve needs to replace a replica
_STARTING_S = 10.0  # after which a client tries again while a replica starts
_REAP_S = 10.0  # for a call whose stream has ended
_REPLICA_LOST = (RayActorError, WorkerCrashedError, ObjectLostError, ReplicaUnavailableError)


class Call:
    """Follows the call; its error becomes the inbox's. Used from one event loop.

    `cold_start_s`: for which it waits for a replica to be started; None: replicas run, and one will take it soon. It is
    asked at the beginning and, since the last replica may stop in between, when none has taken the call in time.
    """

    def __init__(
        self,
        response: DeploymentResponseGenerator[Any],
        listener: Listener,
        inbox: Inbox,
        cold_start_s: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._response, self._listener, self._inbox = response, listener, inbox
        self._cold_start_s = cold_start_s
        self._task = asyncio.create_task(self._follow())

    def leave(self, reason: str) -> None:
        """Nobody reads the stream any more. If tokens are still expected, the request is ended: "stop" or "abort"."""
        is_told = self._listener.forget(self._inbox, reason)
        if self._task.done():
            return
        if is_told:
            timer = asyncio.get_running_loop().call_later(_REAP_S, self._cancel)
            self._task.add_done_callback(lambda _: timer.cancel())
        else:
            self._cancel()

    def _cancel(self) -> None:
        self._give_back()
        self._task.cancel()

    def _give_back(self) -> None:
        """Serve keeps a call until its end has been read or it has been cancelled.

        `_replica_result_future` is private: what is accepted in this turn of the loop, Serve's own `cancel` leaves out.
        """
        accepted = self._response._replica_result_future
        if not accepted.done():
            self._response.cancel()
        elif not accepted.cancelled() and accepted.exception() is None:
            accepted.result().cancel()

    async def _follow(self) -> None:
        try:
            await _accepted(self._response, self._cold_start_s)
            connection = None
            async for name in self._response:
                connection = str(name)
            self._listener.returned(self._inbox, connection or "")
        except (asyncio.CancelledError, RequestCancelledError):
            self._inbox.fail(EngineError("the request was cancelled"))
            self._give_back()
            raise
        except Exception as e:  # noqa: BLE001 - the inbox's reader gets it
            self._inbox.fail(_translated(e))
            self._give_back()


async def _accepted(response: DeploymentResponseGenerator[Any], cold_start_s: Callable[[], float | None]) -> None:
    """Waits until a replica accepts the request. EngineError after a time, without which Serve would wait for ever."""
    began, limit_s = asyncio.get_running_loop().time(), cold_start_s()

    def look_again() -> None:
        nonlocal limit_s
        limit_s = cold_start_s()
        limit.reschedule(began + (limit_s or 0.0))

    limit = asyncio.timeout(limit_s)
    timer = None if limit_s is not None else asyncio.get_running_loop().call_later(_NO_REPLICA_S, look_again)
    try:
        async with limit:
            await response._fetch_future_result_async()  # private: no public call returns when a request is accepted
    except TimeoutError as e:
        if limit_s is not None:
            raise BaseStarting(
                f"the base had no replica, and the one that is being started was not ready after {limit_s:g} s; "
                "send the request again",
                retry_after_s=_STARTING_S,
            ) from e
        raise EngineError("no replica takes requests; `loray status` says why") from e
    finally:
        if timer is not None:
            timer.cancel()


def _translated(error: Exception) -> Exception:
    """The error with loray's class. What the replica raised, Ray wraps into an exception of both classes."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, LorayError):
            return cause
        return cause if isinstance(cause, Exception) else error
    translated: Exception = error
    if isinstance(error, _REPLICA_LOST):
        translated = ReplicaLost("the replica that served this request was lost; send it again")
    elif isinstance(error, DeploymentUnavailableError):
        translated = ReplicaUnavailable("no replica is running; `loray status` says why")
    elif isinstance(error, BackPressureError):
        translated = Overloaded("too many requests wait for a replica; try again later", retry_after_s=1.0)
    if translated is not error:
        translated.__cause__ = error
    return translated
