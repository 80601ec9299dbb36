"""Places for long work: tenants have them in turn, nobody waits for ever, and a thread holds its place to its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from loray.errors import Overloaded, RateLimited
from serve_apps.places import MostPlaces, Places

IN_TIME_S = 20.0  # a bound for what takes milliseconds, where nothing holds it up


@contextmanager
def places(total: int, of_tenant: int, **fields: Any) -> Iterator[Places]:
    """At the end nobody has one, or waits for one."""
    made = Places("publications", MostPlaces(total, of_tenant, **{"wait_s": IN_TIME_S} | fields))
    yield made
    assert (made._taken, made._waiting) == ({}, {})
    made.close()


def go(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


class Holders:
    """Who takes a place, in this order, and leaves it when `leave` says so. A name's first letter is its tenant."""

    def __init__(self, made: Places) -> None:
        self.order: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._places, self._ends = made, dict[str, asyncio.Event]()

    async def come(self, *names: str) -> None:
        for name in names:
            self._ends[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._hold(name))
        await settled()

    async def leave(self, *names: str) -> None:
        for name in names:
            self._ends[name].set()
        await settled()

    async def _hold(self, name: str) -> None:
        async with self._places.one(name[0]):
            self.order.append(name)
            await self._ends[name].wait()

    async def end(self) -> None:
        for event in self._ends.values():
            event.set()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


async def test_no_tenant_takes_all() -> None:
    with places(3, 2) as made:
        holders = Holders(made)
        await holders.come("a1", "a2", "a3", "b1", "b2")
        assert holders.order == ["a1", "a2", "b1"]  # a3 came before, but its tenant has two
        await holders.leave("b1")
        assert holders.order == ["a1", "a2", "b1", "b2"]
        holders.tasks["a3"].cancel()  # its client leaves
        await holders.leave("a1")
        assert holders.order == ["a1", "a2", "b1", "b2"]
        await holders.end()


async def test_tenants_have_their_turns_however_many_of_one_wait() -> None:
    with places(1, 1) as made:
        holders = Holders(made)
        await holders.come("a1", "a2", "a3", "a4", "b1", "b2", "c1")
        for name in ("a1", "a2", "b1", "c1", "a3", "b2", "a4"):
            assert holders.order[-1] == name
            await holders.leave(name)
        await holders.end()


async def test_who_leaves_while_it_waits_is_passed_over() -> None:
    with places(1, 1) as made:
        holders = Holders(made)
        await holders.come("a1", "b1", "b2", "c1")
        holders._ends["a1"].set()
        holders.tasks["b1"].cancel()  # before it knows, the place is free
        await settled()
        assert holders.order == ["a1", "b2"]
        await holders.leave("b2")
        holders.tasks["c1"].cancel()
        await holders.end()


async def test_who_waits_too_long_or_is_one_of_many_is_told_to_come_again() -> None:
    with places(1, 1, wait_s=0.01) as made:
        async with made.one("a"):
            said = "1 publications are under way, and tenant b had no turn in 0.01 s"
            with pytest.raises(Overloaded, match=said):
                await made.run("b", lambda: None)
    with places(1, 1) as made:
        async with made.one("a"):
            waiting = [asyncio.create_task(made.run("b", lambda: None)) for _ in range(8)]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="8 of tenant b wait"):
                await made.run("b", lambda: None)
        await asyncio.gather(*waiting)
    with places(1, 1, waiting=None) as made:
        async with made.one("a"):
            waiting = [asyncio.create_task(made.run("b", lambda: None)) for _ in range(100)]
            await asyncio.sleep(0)
        await asyncio.gather(*waiting)
    with places(2, 2, of_key=1, wait_s=0.0) as made:
        async with made.one("a", "key-1"), made.one("a", "key-2"):
            pass
        async with made.one("a", "key-1"):
            with pytest.raises(RateLimited, match="under way for key key-1, which is the most at once"):
                async with made.one("a", "key-1"):
                    pass


async def test_a_thread_s_place_is_held_until_it_has_ended() -> None:
    """Also where its client has left: else more would be under way than there are places."""
    begun, release, order = threading.Event(), threading.Event(), list[str]()

    def work() -> None:
        begun.set()
        assert release.wait(IN_TIME_S)
        order.append("a")

    with places(1, 1) as made:
        left = asyncio.create_task(made.run("a", work))
        while not begun.is_set():
            await asyncio.sleep(0)
        left.cancel()
        other = asyncio.create_task(made.run("b", lambda: order.append("b")))
        await settled()
        assert (left.cancelled(), dict(made._taken)) == (True, {"": 1, "tenant a": 1})
        release.set()
        await other
        assert order == ["a", "b"]
        with pytest.raises(ValueError, match="of the work"):
            await made.run("a", _fail)


def _fail() -> None:
    raise ValueError("of the work")
