"""The Triton kernels without a GPU: run by its interpreter, and compiled ahead of time.

Each in its own process: Triton reads from the environment, when it is imported, whether to interpret.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install 'loray[cuda]'"
)
_HERE = Path(__file__).parent


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=_HERE.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_op_when_interpreted() -> None:
    out = run("pytest", "-q", str(_HERE / "interpreted.py"), TRITON_INTERPRET="1")
    assert "skipped" not in out


@pytest.mark.slow
def test_the_engine_when_interpreted() -> None:
    run("pytest", "-q", str(_HERE / "in_engine.py"), "-k", "whole and (Llama or Qwen3 or Gemma)", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_loads_when_compiled() -> None:
    out = run("pytest", "-q", str(_HERE / "ahead_of_time.py"), TRITON_INTERPRET="0")
    assert "skipped" not in out


@pytest.mark.slow
def test_every_kernel_compiles_ahead_of_time() -> None:
    out = run("benchmarks.kernels.compile", "--format", "json", "--dtype", "bf16", TRITON_INTERPRET="0")
    usages = json.loads(out)
    assert {u["arch"] for u in usages} == {"sm_80", "sm_90", "sm_100"}
    assert max(u["shared"] for u in usages) <= 160 << 10  # a block of sm_80 has 163 KiB
    assert max(u["spills"] for u in usages) == 0
