"""Lines of batches at once: more while nobody waits, fewer as soon as somebody does."""

from __future__ import annotations

from loray.policy.batch_rate import GROW_S, START, BatchRate


def observe(rate: BatchRate, now: float, wait_s: float = 0.0) -> int:
    rate.observe(now, wait_s)
    return rate.limit


def test_it_grows_by_one_while_nobody_waits() -> None:
    rate = BatchRate()
    assert [observe(rate, now) for now in range(12)] == [START + 1 + n // GROW_S for n in range(12)]
    assert observe(rate, 100.0, 0.2) == START + 3
    assert observe(rate, 101.0) == START + 4


def test_it_is_halved_down_to_one() -> None:
    rate = BatchRate(limit=8)
    assert [observe(rate, now, 0.6) for now in (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)] == [4, 4, 2, 1, 1, 1]
    assert observe(rate, 4.0 + GROW_S) == 2


def test_refusals_at_one_moment_count_once() -> None:
    rate = BatchRate(limit=16)
    for _ in range(8):
        rate.shrink(10.0)
    assert rate.limit == 8
