"""Fixtures: a home with a tiny base, and the command line in that home."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loray.bases.registry import BaseModel, add_base
from loray.cli.main import _run
from loray.machine import Machine, hardware
from tests.cli.run import Loray, Result
from tests.fixtures.planning import MACHINE
from tests.fixtures.tiny import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def known_rates(home: Path) -> None:
    """The home has rates of this machine, so that no command measures them."""
    Machine(hardware(), MACHINE.rates).cache(home)


@pytest.fixture
def loray(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Loray:
    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["loray", *map(str, args)])
        capsys.readouterr()  # what libraries said when the test imported them
        code = _run()
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def base(home: Path, checkpoint: Path) -> BaseModel:
    return add_base(str(checkpoint), home=home)
