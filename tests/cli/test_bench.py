"""`loray bench` finds the benchmarks of a checkout."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from loray.cli.bench import _MODULES
from tests.cli.run import Loray


def test_each_name_is_a_benchmark() -> None:
    names = [
        name if importlib.util.find_spec(name).submodule_search_locations is None else f"{name}.__main__"  # type: ignore[union-attr]
        for name in _MODULES.values()
    ]
    assert all(importlib.util.find_spec(name) for name in names)


def test_its_arguments_are_the_benchmarks_own(loray: Loray, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr("runpy.run_module", lambda name, **_: asked.append([name, *sys.argv]))
    monkeypatch.setattr(sys, "argv", [])
    assert loray("bench", "publish", "--publishes", "3", "--help").code == 0
    assert asked == [["benchmarks.serving.publish"] * 2 + ["--publishes", "3", "--help"]]


def test_the_package_has_none(loray: Loray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "run this in a checkout" in loray("bench", "publish").failed
