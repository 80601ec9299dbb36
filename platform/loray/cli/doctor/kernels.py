"""Checks of the kernels: a compiler, and a library that builds and loads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from loray.cli.doctor.finding import Finding, Situation, error, ok

_TIMEOUT_S = 180.0  # the first build takes tens of seconds on one core
# In a process of its own: a library for other CPUs ends it with a signal.
_LOAD = "from loray.cli.doctor.kernels import load; raise SystemExit(load())"
_COMPILERS = ("g++", "c++", "clang++")
_INSTALL = "apt-get install g++  (or set CXX to a C++17 compiler)"


def compiler(s: Situation) -> Finding:
    chosen = os.environ.get("CXX")
    found = [name for name in (chosen, *_COMPILERS) if name and shutil.which(name)]
    if not found:
        return error("there is no C++ compiler: without compiled kernels, the slow reference kernels run", _INSTALL)
    if chosen and found[0] != chosen:
        return error(f"CXX={chosen} is not a program", "unset CXX")
    return ok(f"C++ compiler: {found[0]}")


def library(s: Situation) -> Finding:
    if s.spec.device.startswith("cuda"):
        return ok("the CPU's kernels are not needed on a GPU")
    reason = problem()
    if reason is None:
        return ok("the CPU's kernels build and load")
    return error(f"the CPU's kernels do not load, and slow reference kernels run instead: {reason}", _mend(reason))


def problem() -> str | None:
    """Why the library does not load; None where it does."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LOAD], capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"not built within {_TIMEOUT_S:.0f} s"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"ended by signal {-done.returncode} while it loaded"
    return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"


def load() -> str | int:
    """What makes a process exit: 0, or why the library cannot be had."""
    from loray_kernels import BackendUnavailable, backend

    try:
        backend("cpu")
    except (BackendUnavailable, OSError) as e:
        return " ".join(str(e).split())
    return 0


def _mend(reason: str) -> str:
    if "cannot be kept" in reason:
        return "export XDG_CACHE_HOME=FOLDER  (one that can be written)"
    if "compile" in reason:
        return _INSTALL
    return "rm -r ~/.cache/loray/kernels  (they are built again at the next start)"
