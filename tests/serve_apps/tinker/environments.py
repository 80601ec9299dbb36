"""Environments of clients, which have the SDK and nothing of loray. Each is made once, below `.cache/tinker`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from loray.files import file_lock
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / ".cache" / "tinker"
COOKBOOK = ("tinker-cookbook[math-rl]==0.5.8", "tinker==0.38.0")
LATER_COOKBOOK = "tinker-cookbook==0.6.1"  # it asks for a tml-renderers that is not published, and its loops need none


def python_with(*packages: str, without_dependencies: str | None = None) -> Path:
    """The interpreter of an environment with these packages, and then one whose dependencies are not installed."""
    named = [*packages, *filter(None, [without_dependencies])]
    folder = FOLDER / "-".join(package.replace("=", "").replace("[", "-").replace("]", "") for package in named)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with file_lock(FOLDER / f"{folder.name}.lock"):
        if not (folder / "whole").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            install = [folder / "bin" / "pip", "install", "--quiet"]
            subprocess.run([*install, *packages], check=True)
            if without_dependencies:
                subprocess.run([*install, "--no-deps", without_dependencies], check=True)
            (folder / "whole").touch()
    return folder / "bin" / "python"


def client_environment() -> dict[str, str]:
    """Of a client's script, which sees nothing of this process's packages."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONWARNINGS")}
    return env | {"TINKER_API_KEY": "tml-of-the-test", "HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0"}


def run_client(python: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [python, "-W", "ignore", *arguments]
    return subprocess.run(
        command, cwd=folder, env=client_environment(), capture_output=True, text=True, timeout=500, check=False
    )
