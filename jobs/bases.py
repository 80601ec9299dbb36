"""The base model of a run on a node that may be new: the one that comes as a package is added when it is needed."""

from __future__ import annotations

import fcntl
from pathlib import Path

from loray.bases import smollm2
from loray.bases.registry import BaseModel, add_base, get_base
from loray.errors import BaseNotFound
from loray.telemetry import get_logger

log = get_logger(__name__)


def ensure_base(home: Path, name: str) -> BaseModel:
    """The base called `name`; `smollm2` is made from its package where this node lacks it, once for all processes.

    BaseNotFound where it is another one: nothing says where that would come from.
    """
    try:
        return get_base(home, name)
    except BaseNotFound:
        if name != smollm2.NAME:
            raise
    home.mkdir(parents=True, exist_ok=True)
    with (home / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return get_base(home, name)
        except BaseNotFound:
            log.info("base model %s is not on this node; making it from its package", name)
            return add_base(name, home=home)
