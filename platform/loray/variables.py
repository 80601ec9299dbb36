"""Parsers of `LORAY_*` variables, whose errors name the variable."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from loray.errors import SettingsError

if TYPE_CHECKING:  # importing it takes 0.1 s, and `loray --help` needs nothing of it
    from loray.spec import TrainingGroup

NONE = "none"  # of LORAY_MAX_JOBS and LORAY_MAX_WORKERS
ON, OFF = "on", "off"  # of LORAY_FILES
STDOUT = "-"  # of LORAY_ACCESS_LOG
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9._-]+(:[0-9]{1,5})?")
_GROUP = re.compile(r"[a-z][a-z0-9-]{0,39}")


def positive(env: Mapping[str, str], name: str) -> float | None:
    value = env.get(name)
    if not value:
        return None
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise SettingsError(f"{name}={value!r} must be a positive number")
    return number


def whole(env: Mapping[str, str], name: str) -> int | None:
    value = env.get(name)
    if not value:
        return None
    if not (value.isascii() and value.isdigit()) or len(value) > 9:
        raise SettingsError(f"{name}={value!r} must be a whole number of at least 0")
    return int(value)


def whole_or_none(env: Mapping[str, str], name: str, default: int) -> int | None:
    if env.get(name) == NONE:
        return None
    value = whole(env, name)
    return default if value is None else value


def size(env: Mapping[str, str], name: str) -> int | None:
    value = env.get(name)
    if not value:
        return None
    from loray.spec import parse_size

    try:
        number = parse_size(value)
    except ValueError:
        number = 0
    if not isinstance(number, int) or number <= 0:
        raise SettingsError(f"{name}={value!r} must be a size, as 20GiB")
    return number


def worker_group(env: Mapping[str, str], name: str) -> TrainingGroup | None:
    if not (value := env.get(name)):
        return None
    from loray.spec import TrainingGroup

    if not _GROUP.fullmatch(value):
        raise SettingsError(f"{name}={value!r} must be the name of a worker group, as training")
    return TrainingGroup(value)


def log_target(value: str | None) -> str | None:
    if value and value != STDOUT and not value.startswith("/"):
        raise SettingsError(f"LORAY_ACCESS_LOG={value!r} must be the absolute path of a file, or - for stdout")
    return value or None


def hashes(env: Mapping[str, str], name: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in env.get(name, "").split(",") if part.strip())
    if not all(_SHA256.fullmatch(part) for part in found):  # what is wrong is not shown: it may be a key
        raise SettingsError(f"{name} must be SHA-256 sums in hexadecimal, with commas between them, and no keys")
    return found


def origins(env: Mapping[str, str], name: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in env.get(name, "").split(",") if part.strip())
    for part in found:
        if part != "*" and not _ORIGIN.fullmatch(part):
            raise SettingsError(
                f"{name} has {part!r}; an origin is scheme, host and port as browsers send them, https://chat.example "
                "or http://localhost:3000, in small letters and without a path, or * for all"
            )
    return found


def names_of(env: Mapping[str, str], name: str) -> dict[str, str]:
    """Return the names in a JSON object, and what each stands for."""
    if not (value := env.get(name)):
        return {}
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(of, str) and of for of in found.values()):
        raise SettingsError(f'{name}={value!r} must be a JSON object of names, as {{"Qwen/Qwen3-8B": "smollm2"}}')
    return found


def one_of(env: Mapping[str, str], name: str, words: tuple[str, ...]) -> str:
    """Return the variable's word, the first one where it is not set."""
    value = env.get(name) or words[0]
    if value not in words:
        raise SettingsError(f"{name}={value!r} must be {' or '.join(words)}")
    return value


def share(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise SettingsError(f"{name}={text!r} must be a share of at least 0, such as 0.1 for 10 %")
    return value
