"""The command `loray` in a home of its own, and tests that are coroutines."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
from click.testing import CliRunner, Result

from loray.cli.main import cli
from tests.fixtures.access import site_of as site_of

Loray = Callable[..., Result]
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test that is a coroutine has an event loop of its own, of the kind that its parameter `loop` names."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    given: dict[str, Any] = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    with asyncio.Runner(loop_factory=LOOPS[given.get("loop", "asyncio")]) as runner:
        runner.run(asyncio.wait_for(pyfuncitem.obj(**given), timeout=120))
    return True


@pytest.fixture
def loray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loray:
    for name in ("LORAY_STORE", "LORAY_CATALOG", "LORAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LORAY_HOME", str(tmp_path / "home"))

    def run(*args: object) -> Result:
        return CliRunner().invoke(cli, [str(a) for a in args])

    return run
