"""The benchmark of the engine's dtypes runs both, on the same requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.engine.dtypes import main
from loray.bases.registry import BaseModel


def test_both_dtypes_have_figures(
    tiny_base: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    base = tiny_base()
    monkeypatch.setenv("LORAY_HOME", str(base.path.parents[1]))
    figures = main(["--model", base.name, "--repeat", "1"])
    assert set(figures) == {"bfloat16", "float32"}
    assert all(value > 0 for found in figures.values() for value in found.values())
    assert "tokens/s of 32 requests" in capsys.readouterr().out
