"""The command as a user calls it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from loray.cli.main import cli


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    monkeypatch.setenv("LORAY_HOME", str(tmp_path))
    monkeypatch.delenv("LORAY_TRACES", raising=False)

    def invoke(*args: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["simulate", *args])
        return result.exit_code, result.output if result.exception is None else f"{result.output}{result.exception}"

    return invoke
