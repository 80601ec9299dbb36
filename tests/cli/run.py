"""Types of the fixtures that call the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PeftFolder = Callable[..., Path]


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def failed(self) -> str:
        """What it said before it ended with 1."""
        assert self.code == 1, self.out
        return self.err


Loray = Callable[..., Result]
