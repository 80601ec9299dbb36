"""The figures that an engine reports."""

from __future__ import annotations

from loray.bases.registry import BaseModel
from loray.engine.metrics import EngineStats
from tests.engine.harness import make_engine


def test_every_figure_is_given(base: BaseModel) -> None:
    assert make_engine(base).stats().model_fields_set == set(EngineStats.model_fields)
