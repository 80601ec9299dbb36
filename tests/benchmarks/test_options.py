"""Options of benchmarks: one that chooses no case is an error before anything is measured."""

from __future__ import annotations

import pytest

from benchmarks.options import check_only
from benchmarks.serving.__main__ import main as serving
from benchmarks.training.__main__ import main as training


def test_only_is_part_of_a_name() -> None:
    check_only("", ["a"])
    check_only("ase", ["other", "case"])
    with pytest.raises(SystemExit, match="--only x is in no case's name; there are: other, case"):
        check_only("x", ["other", "case"])


def test_a_benchmark_without_a_case_is_refused() -> None:
    with pytest.raises(SystemExit, match="--only no-such is in no case's name; there are: "):
        serving(["--only", "no-such"])
    with pytest.raises(SystemExit, match="--only no-such is in no case's name; there are: "):
        training(["--only", "no-such"])
