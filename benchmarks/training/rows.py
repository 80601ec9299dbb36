"""What a case of the benchmark gets, and the row that it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from loray.bases.registry import BaseModel


@dataclass(slots=True)
class Setting:
    """`activations`: bytes that earlier rows measured, by (tokens, P)."""

    base: BaseModel
    num_threads: int
    repeats: int = 3
    num_steps: int = 1
    activations: dict[tuple[int, int], int] = field(default_factory=dict)


class Target(NamedTuple):
    sign: str
    value: float

    def __str__(self) -> str:
        return f"{self.sign} {self.value:g}"

    def is_met(self, reached: float) -> bool:
        return reached >= self.value if self.sign == "≥" else reached <= self.value


class Row(NamedTuple):
    """`cells` and `note` are printed, `figures` are written as JSON, and `reached` is compared with the target."""

    cells: tuple[str, ...]
    figures: Mapping[str, Any]
    reached: float
    note: str = ""


class Case(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def target(self) -> Target | None: ...

    def run(self, setting: Setting) -> Row: ...
