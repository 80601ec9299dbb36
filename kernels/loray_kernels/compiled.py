"""The folder of compiled kernels, and the error of a backend that cannot run."""

from __future__ import annotations

import os
from pathlib import Path


class BackendUnavailable(RuntimeError):
    """A kernel backend cannot run on this machine; the message says why and what to do."""


def cache_folder() -> Path:
    """Give loray/kernels in the user's cache folder. BackendUnavailable for a user who has none."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "loray" / "kernels"
    try:
        return Path.home() / ".cache" / "loray" / "kernels"
    except RuntimeError as e:
        raise BackendUnavailable("there is no folder for compiled kernels: set HOME or XDG_CACHE_HOME") from e
