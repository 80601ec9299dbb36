"""The measured rates of this machine, which are kept in LORAY_HOME."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from loray.planning.devices import HostRates

_FILE = "rates.json"
_VERSION = 2  # of what is measured: those of another one are measured again


def kept_rates(home: Path) -> HostRates | None:
    """This machine's rates; None where they have not been measured."""
    try:
        found = json.loads((home / _FILE).read_text(encoding="utf-8"))
        return HostRates(**found["rates"]) if found["version"] == _VERSION else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def keep_rates(home: Path, rates: HostRates) -> None:
    """In one step, so that no reader sees a part of them. Raises OSError."""
    path = home / _FILE
    home.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"version": _VERSION, "rates": asdict(rates)}) + "\n", encoding="utf-8")
    temporary.replace(path)
