"""Failed loads are tried again later and later, and requests in between get the stored error."""

from __future__ import annotations

import pytest

from loray.engine.memory.adapter_manager import Backoff, Tier
from loray.errors import IntegrityError, StoreError, UnsupportedError
from tests.engine.residency.world import World, ref


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def waits(error: Exception, num_failures: int) -> list[float]:
    """Seconds for which each of so many failures in a row stands."""
    clock = Clock()
    backoff = Backoff(clock)
    out = []
    for _ in range(num_failures):
        backoff.failed("a", error)
        began = clock.now
        while backoff.error("a") is not None:
            clock.now += 0.5
        out.append(clock.now - began)
    return out


def test_the_time_doubles_up_to_a_limit() -> None:
    assert waits(StoreError("no answer"), 8) == [1, 2, 4, 8, 16, 32, 60, 60]
    assert waits(OSError("cannot be read"), 2) == [1, 2]


@pytest.mark.parametrize("error", [IntegrityError("damaged"), UnsupportedError("no such method")])
def test_what_lies_in_the_bytes_stands_longer_and_not_for_ever(error: Exception) -> None:
    assert waits(error, 5) == [60, 120, 240, 480, 600]


def test_a_store_error_says_when_to_try_again_and_others_are_told_as_they_were() -> None:
    clock = Clock()
    backoff = Backoff(clock)
    damaged = IntegrityError("damaged")
    backoff.failed("a", StoreError("no answer"))
    backoff.failed("b", damaged)
    clock.now = 0.25
    error = backoff.error("a")
    assert isinstance(error, StoreError)
    assert error.retry_after_s == 0.75
    assert str(error).startswith("no answer")
    assert backoff.error("b") is damaged
    assert backoff.error("c") is None


def test_a_success_and_a_long_time_without_failures_begin_anew() -> None:
    clock = Clock()
    backoff = Backoff(clock)
    for forget in (lambda: backoff.succeeded("a"), lambda: setattr(clock, "now", clock.now + 1000)):
        for _ in range(5):
            backoff.failed("a", StoreError("no answer"))
        forget()
        backoff.failed("a", StoreError("no answer"))
        error = backoff.error("a")
        assert isinstance(error, StoreError)
        assert error.retry_after_s == 1.0
        backoff.succeeded("a")


def test_many_requests_for_what_cannot_be_loaded_are_few_loads() -> None:
    """One request every 0.1 s for two minutes: the store is asked 7 times, not 1,200."""
    world = World()
    for _ in range(1200):
        world.adapter_manager.add_waiter(ref("a"))
        world.adapter_manager.poll()
        if world.adapter_manager.table.tier(ref("a")) is Tier.LOADING:
            world.loads["a"].set_exception(StoreError("no answer"))
            world.adapter_manager.poll()
        assert world.adapter_manager.table.tier(ref("a")) is Tier.FAILED
        assert isinstance(world.adapter_manager.table.error(ref("a")), StoreError)
        world.adapter_manager.remove_waiter(ref("a"))
        world.adapter_manager.table.check_integrity()
        world.now += 0.1
    assert world.num_loads == 7
    assert world.adapter_manager.counts.num_failed_loads == 7
