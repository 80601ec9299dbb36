"""Bytes of an adapter as `loray recommend` estimates them, against files of the real base."""

from __future__ import annotations

import pytest

from benchmarks.training.recommend import file_bytes
from loray.bases.registry import BaseModel
from loray.planning.devices import PRESETS
from loray.recommend import Answers, candidates, estimate_methods


def test_estimated_bytes_are_those_of_the_file(smollm2: BaseModel) -> None:
    estimates = estimate_methods(Answers(2048, 1), smollm2.config, PRESETS["a100-80gb"])
    recipes = dict(candidates(2048, smollm2.config))
    assert list(recipes) == ["lora", "dora", "vera", "longlora"]
    for estimate in estimates:
        nbytes = file_bytes(recipes[estimate.method], smollm2)
        assert nbytes == pytest.approx(estimate.adapter_bytes, rel=0.2), estimate.method
