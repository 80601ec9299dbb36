"""Calls of an object's methods over a socket: what they return and raise, and what their ends do to one another."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from jobs.trainer import calls as module
from jobs.trainer.calls import Calls, CallServer, connect
from loray.errors import ConflictError, Overloaded
from loray.spec.datums import Datum, ForwardBackward, LossOutput


class Target:
    """Has methods as a trainer's are."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()

    async def echo(self, value: Any) -> Any:
        return value

    async def wait(self) -> str:
        await self.may_end.wait()
        return "ended"

    async def refuse(self) -> None:
        raise Overloaded("too many", 2.5)

    async def fail(self) -> None:
        raise ZeroDivisionError("by zero")

    async def give_what_cannot_go(self) -> Any:
        return lambda: None

    async def give_what_cannot_come(self) -> Any:
        return Unreadable()


class Unreadable:
    def __reduce__(self) -> Any:
        return int, ("no number",)


@asynccontextmanager
async def connected(target: Target) -> AsyncIterator[tuple[CallServer, Calls]]:
    server = CallServer(target)
    calls: Calls | None = None
    try:
        calls = await connect(await server.start())
        yield server, calls
    finally:
        if calls is not None:
            calls.close()
        server.close()
        target.may_end.set()
        while len(asyncio.all_tasks()) > 1:  # the other end sees it
            await asyncio.sleep(0)


def test_operations_and_results_are_the_same_at_the_other_end() -> None:
    async def run() -> None:
        async with connected(Target()) as (_, calls):
            op = ForwardBackward("m", (Datum(np.arange(3), np.arange(1, 4)),), forward_only=True)
            there = await calls.ask("echo", op)
            assert there.model == "m"
            assert there.forward_only
            np.testing.assert_array_equal(there.datums[0].target_ids, op.datums[0].target_ids)
            output = LossOutput((np.ones(3, np.float32),), 2.5, {"tokens": 3.0})
            back = await calls.ask("echo", output)
            assert (back.loss, back.metrics) == (2.5, {"tokens": 3.0})
            np.testing.assert_array_equal(back.logprobs[0], output.logprobs[0])

    asyncio.run(run())


def test_a_call_that_waits_lets_others_go_first() -> None:
    async def run() -> None:
        target = Target()
        async with connected(target) as (server, calls):
            waiting = asyncio.create_task(calls.ask("wait"))
            assert await calls.ask("echo", 1) == 1
            assert not waiting.done()
            other = await connect(await server.start())  # of a second process
            assert await other.ask("echo", 2) == 2
            other.close()
            target.may_end.set()
            assert await waiting == "ended"

    asyncio.run(run())


def test_errors_are_those_of_the_method() -> None:
    async def run() -> None:
        async with connected(Target()) as (_, calls):
            with pytest.raises(Overloaded, match="too many") as refused:
                await calls.ask("refuse")
            assert refused.value.retry_after_s == 2.5
            with pytest.raises(RuntimeError, match="fail has failed: ZeroDivisionError: by zero"):
                await calls.ask("fail")
            with pytest.raises(RuntimeError, match="give_what_cannot_go has failed"):
                await calls.ask("give_what_cannot_go")
            assert await calls.ask("echo", "still there") == "still there"

    asyncio.run(run())


def test_an_answer_that_cannot_be_read_is_told() -> None:
    """Asked again, it would be no other one."""

    async def run() -> None:
        async with connected(Target()) as (_, calls):
            with pytest.raises(ValueError, match="no number"):
                await calls.ask("give_what_cannot_come")
            assert not calls.is_open

    asyncio.run(run())


def test_calls_end_with_their_connection() -> None:
    async def run() -> None:
        async with connected(Target()) as (_, calls):
            waiting = asyncio.create_task(calls.ask("wait"))
            cancelled = asyncio.create_task(calls.ask("wait"))
            await calls.ask("echo", 0)
            cancelled.cancel()
            calls.close()
            with pytest.raises(ConnectionError, match="has ended"):
                await waiting
            with pytest.raises(ConnectionError, match="has ended"):
                await calls.ask("echo", 1)
            with pytest.raises(asyncio.CancelledError):
                await cancelled

    asyncio.run(run())


def test_another_user_is_not_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        def user(sock: socket.socket) -> int:  # of what the server has accepted another one
            return os.getuid() + bool(sock.getsockname())

        monkeypatch.setattr(module, "peer_user", user)
        async with connected(Target()) as (_, calls):
            with pytest.raises(ConnectionError):
                await calls.ask("echo", 1)

    asyncio.run(run())


def test_a_socket_of_another_user_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a client would connect again and again: that user does not listen to it."""
    monkeypatch.setattr(module, "peer_user", lambda _: os.getuid() + 1)

    async def run() -> None:
        with pytest.raises(PermissionError, match="another user's"):
            async with connected(Target()):
                pass

    asyncio.run(run())


def test_a_socket_of_another_node_is_not_found() -> None:
    async def run() -> None:
        with pytest.raises(OSError, match="refused"):
            await connect("loray-of-another-node")

    asyncio.run(run())


def test_a_conflict_keeps_its_class() -> None:
    async def run() -> None:
        class Conflicting(Target):
            async def echo(self, value: Any) -> Any:
                raise ConflictError(f"{value} was another one")

        async with connected(Conflicting()) as (_, calls):
            with pytest.raises(ConflictError, match="operation 3 was another one"):
                await calls.ask("echo", "operation 3")

    asyncio.run(run())
