"""What a check finds, and what it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from loray.cli.doctor.facts import Facts
from loray.settings import Settings
from loray.spec import ServeSpec

Severity = Literal["ok", "warning", "error"]


class Finding(NamedTuple):
    """`warning`: it works, but slower or not for long. `mend`: a command, or what to change; None where all is well."""

    severity: Severity
    message: str
    mend: str | None = None


@dataclass(frozen=True, slots=True)
class Situation:
    """`spec`: the deployment that this machine is to run, or one base of it, beside `others`. `deep`: bytes are hashed,
    which takes as long as reading them. `file`: where the spec is; None: on the command line.
    """

    settings: Settings
    spec: ServeSpec
    facts: Facts
    deep: bool = False
    others: tuple[ServeSpec, ...] = ()
    file: Path | None = None


class Check(NamedTuple):
    """`serves`: only what serves or trains here needs it, and not a machine that asks the server of LORAY_URL."""

    name: str
    run: Callable[[Situation], Finding]
    serves: bool = True


def ok(message: str) -> Finding:
    return Finding("ok", message)


def warning(message: str, mend: str) -> Finding:
    return Finding("warning", message, mend)


def error(message: str, mend: str) -> Finding:
    return Finding("error", message, mend)
