"""Options of limits, and how limits are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from loray.spec import Limits, format_size


class _Limit(click.ParamType):  # type: ignore[type-arg]  # generic in some versions of click
    """A number, or `word`, which takes the limit away."""

    def __init__(self, number: Callable[[str], Any], word: str) -> None:
        self.name, self._number, self._word = f"number|{word}", number, word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == self._word:
            return value
        try:
            return self._number(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor {self._word!r}", param, ctx)


# option, field, type, help
_Row = tuple[str, str, type[Any], str]
_OF_KEYS: tuple[_Row, ...] = (
    ("--rpm", "rpm_limit", int, "Requests a minute."),
    ("--tpm", "tpm_limit", int, "Tokens a minute, of prompts and answers."),
    ("--parallel", "max_parallel_requests", int, "Requests at once."),
    ("--budget", "max_budget", float, "Tokens in one --budget-duration."),
    ("--budget-duration", "budget_duration", str, "Such as 12h or 30d (default 30d)."),
    ("--min-priority", "min_priority", int, "The most urgent priority that requests may ask for."),
)
_OF_TENANTS: tuple[_Row, ...] = (
    ("--adapters", "max_adapters", int, "Names of adapters."),
    ("--stored-bytes", "max_stored_bytes", str, "Size of all adapters, for instance 20GiB."),
    ("--jobs", "max_jobs", int, "Training jobs at once."),
    ("--workers", "max_workers", int, "Training workers at once."),
)
_AWAY = "none"


def limit_options(
    *, of_tenant: bool = False, takes_away: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`takes_away`: `none` is allowed, too, and takes a limit away."""

    def decorated(command: Callable[..., Any]) -> Callable[..., Any]:
        for option, field, kind, text in reversed(_OF_KEYS + (_OF_TENANTS if of_tenant else ())):
            of: Any = _Limit(kind, _AWAY) if takes_away and kind is not str else kind
            command = click.option(option, field, type=of, help=text)(command)
        return command

    return decorated


def given_limits(options: Mapping[str, Any]) -> dict[str, Any]:
    """Field → value of the options that are given; None where `none` is."""
    return {name: None if value == _AWAY else value for name, value in options.items() if value is not None}


def limits_from(options: Mapping[str, Any], before: Limits | None = None) -> Limits:
    """The options that are given, over the limits of `before`."""
    known = {} if before is None else before.model_dump(include=set(Limits.model_fields))
    return Limits.parse(known | given_limits(options), source="the command line")


def describe(limits: Limits) -> str:
    """In a few words; empty without limits."""
    words = {
        "requests/min": limits.rpm_limit,
        "tokens/min": limits.tpm_limit,
        "at once": limits.max_parallel_requests,
        f"tokens/{limits.budget_duration}": None if limits.max_budget is None else f"{limits.max_budget:,.0f}",
        "adapters": limits.max_adapters,
        "stored": None if limits.max_stored_bytes is None else format_size(limits.max_stored_bytes),
        "jobs": limits.max_jobs,
        "workers": limits.max_workers,
        "least priority": limits.min_priority,
    }
    return ", ".join(f"{value} {name}" for name, value in words.items() if value is not None)
