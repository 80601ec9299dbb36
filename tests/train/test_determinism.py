"""Runs whose algorithms are torch's deterministic ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from loray.bases.registry import BaseModel
from loray.train.checkpoint import FolderReporter, Metrics
from loray.train.loop import train
from tests.train.test_loop import TINY, curve, make_data, recipe


def test_a_deterministic_run_has_torchs_deterministic_algorithms_and_leaves_them_as_they_were(
    tiny_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    seen = set[bool]()

    class Looks(FolderReporter):
        def report(self, metrics: Metrics, checkpoint: Path | None) -> None:
            seen.add(torch.are_deterministic_algorithms_enabled())
            super().report(metrics, checkpoint)

    curves = []
    for wanted in (True, False):
        spec, reporter = recipe("longlora", max_steps=2, deterministic=wanted), Looks(tmp_path / f"run-{wanted}")
        train(spec, tiny_base(**TINY), make_data(tmp_path, spec), reporter=reporter, workdir=tmp_path)
        assert seen == {wanted}
        assert not torch.are_deterministic_algorithms_enabled()
        seen.clear()
        curves.append(curve(reporter))
    assert curves[0] == curves[1]  # on a CPU, where all algorithms are
