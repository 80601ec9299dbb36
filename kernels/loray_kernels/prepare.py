"""Tables and weights that all layers of a step pass again, and what a backend makes of them once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

T = TypeVar("T", bound="Preparable")
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, eq=False)
class Preparable:
    """An argument of ops that backends prepare: what they make of it lives as long as it does.

    prepared  by the function that made it, see `prepare_once`
    """

    prepared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)


def prepare_once(make: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T, P], R]:
    """Keep what `make` makes of its first argument there. Its other arguments are the same in each call."""

    @wraps(make)
    def prepared(table: T, /, *args: P.args, **kwargs: P.kwargs) -> R:
        found: R | None = table.prepared.get(prepared)
        if found is None:
            found = table.prepared[prepared] = make(table, *args, **kwargs)
        return found

    return prepared
