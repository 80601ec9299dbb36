"""Types of the fixtures that call the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PeftFolder = Callable[..., Path]


class Result(NamedTuple):
    code: int
    out: str
    err: str


Loray = Callable[..., Result]
