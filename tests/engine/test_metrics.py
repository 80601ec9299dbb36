"""The figures that an engine reports: all of them, the usage of adapters, histograms."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from loray.bases.registry import BaseModel
from loray.engine.metrics import AdapterUsage, AdapterUsageLog, EngineStats, Histogram
from tests.fixtures.engines import make_engine
from tests.fixtures.scheduling import ref


def test_every_figure_is_given(base: BaseModel) -> None:
    assert make_engine(base).stats().model_fields_set == set(EngineStats.model_fields)


def clock() -> Callable[[], float]:
    """It is a second later each time."""
    return map(float, itertools.count(1)).__next__


def test_uses_outlive_the_adapter_and_go_on_when_it_comes_back() -> None:
    log = AdapterUsageLog(now=clock())
    a = ref("a")
    log.request_came(a)
    log.request_ended(a, 30)
    log.dropped(a)
    assert log.get(a.digest) == AdapterUsage(a, last_used_at=2.0, num_uses=1, num_tokens=30)
    renamed = replace(a, name="b")
    log.request_came(renamed)
    log.request_ended(renamed, 5)
    assert log.get(a.digest) == AdapterUsage(renamed, last_used_at=4.0, num_uses=2, num_tokens=35)
    assert len(log.all()) == 1


def test_what_is_held_is_never_forgotten_and_of_the_others_the_longest_gone_is() -> None:
    forgotten: list[str] = []
    log = AdapterUsageLog(num_kept=2, now=clock(), on_forget=forgotten.append)
    for name in "abcde":
        log.request_came(ref(name))
    for name in "bca":
        log.dropped(ref(name))
    assert [u.ref.name for u in log.all()] == ["d", "e", "c", "a"]
    assert log.get(ref("b").digest) is None
    log.request_came(ref("c"))
    log.dropped(ref("c"))
    log.dropped(ref("d"))
    assert [u.ref.name for u in log.all()] == ["e", "c", "d"]
    assert forgotten == [ref("b").digest, ref("a").digest]


def test_bounds_belong_to_the_bucket_they_close() -> None:
    histogram = Histogram((1, 2.5))
    for value in (0.5, 1, 1.5, 2.5, 9):
        histogram.observe(value)
    before = histogram.counts()
    histogram.observe(3)
    assert before == ((1, 2.5), (2, 2, 1), pytest.approx(14.5))
    assert (sum(before.counts), sum(histogram.counts().counts)) == (5, 6)
