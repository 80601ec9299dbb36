"""The figures that an engine reports: all of them, and histograms."""

from __future__ import annotations

import pytest

from loray.bases.registry import BaseModel
from loray.engine.metrics import EngineStats, Histogram
from tests.fixtures.engines import make_engine


def test_every_figure_is_given(base: BaseModel) -> None:
    assert make_engine(base).stats().model_fields_set == set(EngineStats.model_fields)


def test_bounds_belong_to_the_bucket_they_close() -> None:
    histogram = Histogram((1, 2.5))
    for value in (0.5, 1, 1.5, 2.5, 9):
        histogram.observe(value)
    before = histogram.counts()
    histogram.observe(3)
    assert before == ((1, 2.5), (2, 2, 1), pytest.approx(14.5))
    assert (sum(before.counts), sum(histogram.counts().counts)) == (5, 6)
