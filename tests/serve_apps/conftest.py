"""The command `loray`, in a home of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from loray.cli.main import cli

Loray = Callable[..., Result]


@pytest.fixture
def loray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loray:
    for name in ("LORAY_STORE", "LORAY_CATALOG", "LORAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LORAY_HOME", str(tmp_path / "home"))

    def run(*args: object) -> Result:
        return CliRunner().invoke(cli, [str(a) for a in args])

    return run
