"""Lines of batches at once: more while nobody waits, fewer as soon as somebody does, none for a while."""

from __future__ import annotations

from loray.policy.batch_rate import GROW_S, PAUSE_S, START, BatchRate


def observe(rate: BatchRate, now: float, wait_s: float = 0.0, pool_use: float = 0.0) -> int:
    rate.observe(now, wait_s=wait_s, pool_use=pool_use)
    return rate.limit


def test_it_grows_by_one_while_there_is_room() -> None:
    rate = BatchRate()
    assert [observe(rate, now) for now in range(12)] == [START + 1 + n // GROW_S for n in range(12)]
    for wait_s, pool_use in ((0.2, 0.0), (0.0, 0.9)):
        assert observe(rate, 100.0, wait_s, pool_use) == START + 3
    assert observe(rate, 101.0) == START + 4


def test_it_is_halved_and_pauses() -> None:
    rate = BatchRate(limit=8)
    assert [observe(rate, now, 0.6) for now in (0.0, 0.5, 1.0, 2.0, 3.0)] == [4, 4, 2, 1, 0]
    assert observe(rate, 3.0 + PAUSE_S - 1) == 0
    assert observe(rate, 3.0 + PAUSE_S) == 1
    assert observe(rate, 3.0 + PAUSE_S + GROW_S) == 2


def test_refusals_at_one_moment_count_once() -> None:
    rate = BatchRate(limit=16)
    for _ in range(8):
        rate.yield_to_others(10.0)
    assert rate.limit == 8


def test_a_base_that_wakes_up_begins_anew() -> None:
    rate = BatchRate(limit=1)
    rate.yield_to_others(0.0)
    assert rate.limit == 0
    rate.begin(1.0)
    assert rate.limit == 1
    assert observe(rate, 2.0) == 1
