"""The trainers of bases, as the front asks them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayActorError

from loray.errors import ClusterError, Overloaded
from loray.spec import AnyDType
from serve_apps.tinker.futures import POLL_S, Future
from serve_apps.tinker.sessions import ServedNames

_RETRY_S = 1.0
_AWAY_S = 300.0  # that a trainer may need to come back


class TrainerAway(ClusterError):
    """The trainer of a base is starting, or has died and starts again."""


class Trainers:
    """Asks the trainer of a base, which is there or is started."""

    def __init__(self, names: ServedNames, find: Callable[[str, AnyDType], Any]) -> None:
        """`find` returns the client of a base's trainer by the base's name, and starts the trainer where there is none,
        with the engine's dtype. It may block.
        """
        self._names, self._find = names, find
        self._trainers: dict[str, Any] = {}

    @property
    def bases(self) -> tuple[str, ...]:
        """Return those whose trainers have been asked for anything."""
        return tuple(self._trainers)

    async def ask(self, base: str, method: str, *arguments: Any) -> Any:
        """Return what the method of the base's trainer returns. Raises what it raises, and TrainerAway."""
        try:
            trainer = self._trainers.get(base)
            if trainer is None:
                dtype = (await self._names.find(base)).dtype
                trainer = self._trainers[base] = await asyncio.to_thread(self._find, base, dtype)
            return await getattr(trainer, method)(*arguments)
        except RayActorError as e:
            self._trainers.pop(base, None)
            raise TrainerAway(f"the trainer of {base} is starting again; ask in a moment") from e

    async def insist(self, future: Future, base: str, method: str, *arguments: Any) -> Any:
        """Ask until the trainer is there and has a place. `future` says meanwhile why it waits."""
        deadline = asyncio.get_running_loop().time() + _AWAY_S
        while True:
            try:
                answer = await self.ask(base, method, *arguments)
                future.state, future.reason = "active", None
                return answer
            except Overloaded as e:
                future.state, future.reason = "paused_capacity", str(e)
            except TrainerAway:
                if asyncio.get_running_loop().time() >= deadline:
                    raise
            await asyncio.sleep(_RETRY_S)

    async def result(self, future: Future, base: str, model: str, seq: int) -> Any:
        """Wait for the result of an operation, however long the queue before it is."""
        while (result := await self.insist(future, base, "result", model, seq, POLL_S)) is None:
            pass
        return result
