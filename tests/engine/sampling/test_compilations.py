"""Whose constraint is compiled next, and what becomes of those that wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from loray.engine.request import Request
from loray.engine.sampling import compilations
from loray.engine.sampling.compilations import Compilations
from loray.errors import Overloaded, RequestError
from loray.spec import Constraint, GenerateRequest, SamplingParams


class World:
    """One thread compiles, each time when a test lets it. `compiled`: the patterns, in their order."""

    def __init__(self) -> None:
        self.now, self.compiled, self.error = 0.0, list[str](), None
        self.began, self.go_on, self.woken = (threading.Semaphore(0) for _ in range(3))
        self.error: Exception | None = None
        self.all = Compilations(self._compile, self.woken.release, lambda: self.now)  # type: ignore[arg-type]

    def _compile(self, constraint: Constraint) -> str:
        self.began.release()
        assert self.go_on.acquire(timeout=60)
        self.compiled.append(constraint.text)
        if self.error is not None:
            raise self.error
        return f"matcher of {constraint.text}"

    def add(self, pattern: str, tenant: str = "t") -> Request:
        constraint = Constraint.from_regex(pattern)
        request = Request(GenerateRequest("r", (1,), SamplingParams(structured=constraint), tenant=tenant), 0)
        self.all.add(request, constraint)
        return request

    def begin(self) -> None:
        """Wait until the thread compiles."""
        assert self.began.acquire(timeout=60)

    def finish(self, num: int = 1) -> dict[Request, Any]:
        """Let it end so many; what is taken then."""
        for _ in range(num):
            self.go_on.release()
            assert self.woken.acquire(timeout=60)
        return dict(self.all.take())


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(compilations, "_NUM_THREADS", 1)
    world = World()
    yield world
    for _ in range(100):
        world.go_on.release()
    world.all.close()


def test_a_tenant_with_many_constraints_holds_up_itself(world: World) -> None:
    loud = [world.add(f"loud{i}", "loud") for i in range(10)]
    world.begin()
    quiet = [world.add(f"quiet{i}", f"quiet {i}") for i in range(2)]
    assert world.finish().keys() == {loud[0]}
    assert world.finish(3).keys() == {loud[1], *quiet}
    assert len(world.finish(8)) == 8
    assert world.all.next_deadline == float("inf")


def test_a_constraint_that_two_tenants_have_is_compiled_once_at_the_turn_that_comes_first(world: World) -> None:
    for i in range(4):
        world.add(f"loud{i}", "loud")
    world.begin()
    same = world.add("same", "loud"), world.add("same", "quiet")
    assert not {*world.finish()} & {*same}
    assert {*same} <= {*world.finish(2)}
    world.finish(2)
    assert sorted(world.compiled) == ["loud0", "loud1", "loud2", "loud3", "same"]
    known = world.add("same")
    assert dict(world.all.take()) == {known: "matcher of same"}


def test_what_nobody_waits_for_is_not_compiled(world: World) -> None:
    first = world.add("first")
    world.begin()
    both = world.add("both"), world.add("both")
    gone = world.add("gone")
    for request in (first, both[0], gone):
        world.all.cancel(request)
    assert world.finish(2) == {both[1]: "matcher of both"}
    assert world.compiled == ["first", "both"]
    assert dict(world.all.take()) == {}
    again = world.add("gone")
    assert world.finish() == {again: "matcher of gone"}
    assert not world.all._queues
    assert not world.all._waiting


def test_who_waits_too_long_is_refused(world: World) -> None:
    first = world.add("first")
    world.begin()
    world.now = 1.0
    late, other = world.add("late"), world.add("first")
    assert world.all.next_deadline == 10.0
    world.now = 10.0
    ((request, error),) = world.all.take()
    assert request is first
    assert isinstance(error, Overloaded)
    assert world.finish() == {other: "matcher of first"}
    world.now = 11.0
    assert [request for request, _ in world.all.take()] == [late]


def test_a_failure_is_not_kept(world: World) -> None:
    world.error = RequestError("wrong")
    requests = world.add("a"), world.add("a")
    assert world.finish() == dict.fromkeys(requests, world.error)
    world.error = None
    again = world.add("a")
    assert world.finish() == {again: "matcher of a"}
    assert len(world.all._known) == 1
