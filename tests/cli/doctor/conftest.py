"""A machine on which all is well, of which tests spoil one thing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loray.cli.doctor import Facts, Situation
from loray.settings import Settings
from loray.spec import ServeSpec

Situations = Callable[..., Situation]
GIB = 1 << 30


@pytest.fixture
def situation(tmp_path: Path) -> Situations:
    """`situation(shm=0, env={"LORAY_URL": …}, spec={"port": 1})`: facts that differ, the environment, the spec."""

    def make(env: dict[str, str] | None = None, spec: dict[str, Any] | None = None, **facts: Any) -> Situation:
        well: dict[str, Any] = {
            "python": "3.12.1",
            "requirements": ("numpy>=1.26", "torch>=2.6,<3", "mlflow-skinny>=3; extra == 'mlflow'"),
            "installed": {"numpy": "2.0", "torch": "2.9.1"},
            "available": 16 * GIB,
            "shm": 8 * GIB,
            "disk_free": 100 * GIB,
            "disk_total": 200 * GIB,
            "max_open_files": 65536,
            "hard_open_files": 65536,
        }
        settings = Settings.from_env({"LORAY_HOME": str(tmp_path / "home")} | (env or {}))
        return Situation(settings, ServeSpec(**{"base": "tiny"} | (spec or {})), Facts(**well | facts))

    return make
