"""Rewards and environments in processes of their own, which may fail, hang and die without the driver."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from jobs.events import first_line
from loray.errors import LorayError, SpecError
from loray.spec import GrpoSpec, RlSpec
from loray.telemetry import get_logger
from loray.train.rl.rewards import Environment, Row, Said, Turn, environments_of, finite

log = get_logger(__name__)

_MOST_DEATHS = 3  # of an actor's process, while it does one thing
_START_S = 120.0  # of an actor's process, which imports
_LOOK_S = 0.1


class EnvironmentHost:
    """Holds the episodes of some samples. Runs in an actor; code that blocks holds up this actor's others alone."""

    def __init__(self, objective: Mapping[str, Any], paths: Sequence[str]) -> None:
        sys.path[:0] = [path for path in paths if path not in sys.path]
        kind = GrpoSpec if objective["type"] == "grpo" else RlSpec
        self._make = environments_of(kind.model_validate(objective))
        self._episodes: dict[str, Environment] = {}

    async def ready(self) -> None:
        """Answer, once what the recipe names is imported."""

    async def start(self, key: str, row: Row) -> Said:
        self._episodes[key] = environment = self._make()
        return await environment.start(row)

    async def step(self, key: str, answer: str) -> Turn:
        turn = Turn(*await self._episodes[key].step(answer))
        if turn.done:
            del self._episodes[key]
        return turn._replace(reward=finite(turn.reward))

    async def reward(self, row: Row, answer: str) -> float:
        """Compute the reward of an answer to a row's own prompt."""
        environment = self._make()
        await environment.start(row)
        return (await environment.step(answer)).reward


class EpisodeFailed(Exception):
    """An episode's code failed, or took too long; the message says how. Another try may do better."""


class _Place(NamedTuple):
    host: Any
    key: str


class Environments:
    """The actors of a run. Each episode stays at one of them; a reward alone is computed at any."""

    def __init__(self, spec: RlSpec, paths: Sequence[str]) -> None:
        """`paths`: folders in which modules of the recipe lie. Raises SpecError where one cannot be imported."""
        # No CPU: engines of a small cluster have them all, and Ray would wait for one without end.
        actor = ray.remote(EnvironmentHost).options(num_cpus=0, max_restarts=-1, scheduling_strategy="SPREAD")
        self._timeout_s = spec.timeout_s
        self._hosts: list[ActorHandle] = [
            actor.remote(spec.model_dump(mode="json"), list(paths)) for _ in range(spec.num_env_actors)
        ]
        self._next = 0
        self._restarts: dict[ActorHandle, asyncio.Future[None]] = {}  # of those that are not up again
        try:
            ray.get([host.ready.remote() for host in self._hosts], timeout=_START_S)
        except RayTaskError as e:
            self.close()
            raise e.cause from None
        except RayActorError as e:
            self.close()
            told = str(e)
            at = told.rfind("SpecError: ")
            raise SpecError(told[at:].partition("\n")[0].removeprefix("SpecError: ") if at >= 0 else told) from None

    async def start(self, key: str, row: Row) -> tuple[_Place, Said]:
        """Begin an episode. Raises EpisodeFailed."""
        place = _Place(self._any(), key)
        return place, await self._call(place.host, partial(place.host.start.remote, key, row))

    async def step(self, place: _Place, answer: str) -> Turn:
        """Take an answer of an episode. Raises EpisodeFailed, also where its process died: it begins anew."""
        turn: Turn = await self._call(place.host, partial(place.host.step.remote, place.key, answer))
        return turn

    async def reward(self, row: Row, answer: str) -> float:
        """Compute a reward; a process that dies is asked again. Raises EpisodeFailed."""
        for left in reversed(range(_MOST_DEATHS)):
            host = self._any()
            try:
                return float(await self._call(host, partial(host.reward.remote, row, answer)))
            except _HostDied:
                if not left:
                    raise
        raise AssertionError

    def close(self) -> None:
        for host in self._hosts:
            ray.kill(host)

    def _any(self) -> ActorHandle:
        self._next += 1
        return self._hosts[self._next % len(self._hosts)]

    async def _call(self, host: ActorHandle, send: Callable[[], Awaitable[Any]]) -> Any:
        if (restart := self._restarts.get(host)) is not None:  # no part of what its code takes
            await asyncio.shield(restart)
        try:
            return await asyncio.wait_for(_answer(send()), self._timeout_s)
        except TimeoutError:
            ray.kill(host, no_restart=False)  # what hangs there would hold up all that come after it
            self._restart(host)
            raise EpisodeFailed(f"it took more than objective.timeout_s ({self._timeout_s:g} s)") from None
        except RayActorError as e:
            self._restart(host)
            raise _HostDied(f"its process died: {first_line(e)}") from None
        except RayTaskError as e:
            cause = e.cause
            raise EpisodeFailed(str(cause) if isinstance(cause, LorayError) else first_line(e)) from None

    def _restart(self, host: ActorHandle) -> None:
        if host not in self._restarts:
            self._restarts[host] = asyncio.ensure_future(self._up(host))

    async def _up(self, host: ActorHandle) -> None:
        """Wait until an actor answers again; who calls it afterwards learns whether it does."""
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            try:
                await asyncio.wait_for(_answer(host.ready.remote()), _START_S)
                break
            except (TimeoutError, RayActorError):
                await asyncio.sleep(_LOOK_S)
        del self._restarts[host]


class _HostDied(EpisodeFailed):
    pass


async def _answer(reference: Awaitable[Any]) -> Any:
    return await reference
