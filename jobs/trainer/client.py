"""How other processes ask a trainer."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from jobs.trainer.calls import Calls, connect
from loray.errors import LorayError


class TrainerClient:
    """Has the methods of a trainer, as coroutines that raise what they raise there: over a socket from a process on its
    node, else by Ray's calls. Used from one event loop.

    After a kill Ray starts the trainer again, and what had no answer is asked again, where the same again changes
    nothing: callers only wait. Once it starts no more, methods raise RayActorError.
    """

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor
        self._connecting = asyncio.Lock()
        self._calls: Calls | None = None
        self._is_elsewhere = False

    def __getattr__(self, method: str) -> Any:
        return partial(self._ask, method)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        while (calls := await self._connected()) is not None:
            try:
                return await calls.ask(method, *arguments)
            except ConnectionError:
                continue  # which waits until the trainer is there again
        return await self._ask_by_ray(method, *arguments)

    async def _connected(self) -> Calls | None:
        """Return the connection that stands, or a new one; None: the trainer is on another node, or another user's."""
        async with self._connecting:
            if not self._is_elsewhere and (self._calls is None or not self._calls.is_open):
                name = await self._ask_by_ray("listen")
                try:
                    self._calls = await connect(name)
                except OSError:
                    self._is_elsewhere, self._calls = True, None
            return self._calls

    async def _ask_by_ray(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self._actor, method).remote(*arguments)
        except RayTaskError as e:
            if isinstance(e.cause, LorayError):
                raise e.cause from None
            raise
