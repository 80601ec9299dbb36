"""Options of limits, and how limits are shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from loray.spec import Limits, format_size

_OF_KEYS = (
    click.option("--rpm", "rpm_limit", type=int, help="Requests a minute."),
    click.option("--tpm", "tpm_limit", type=int, help="Tokens a minute, of prompts and answers."),
    click.option("--parallel", "max_parallel_requests", type=int, help="Requests at once."),
    click.option("--budget", "max_budget", type=float, help="Tokens in one --budget-duration."),
    click.option("--budget-duration", help="Such as 12h or 30d (default 30d)."),
    click.option("--min-priority", type=int, help="The most urgent priority that requests may ask for."),
)
_OF_TENANTS = (
    click.option("--stored-bytes", "max_stored_bytes", help="Size of all adapters, for instance 20GiB."),
    click.option("--jobs", "max_jobs", type=int, help="Training jobs at once."),
    click.option("--workers", "max_workers", type=int, help="Training workers at once."),
)


def limit_options(*, of_tenant: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorated(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(_OF_KEYS + (_OF_TENANTS if of_tenant else ())):
            command = option(command)
        return command

    return decorated


def limits_from(options: dict[str, Any], before: Limits | None = None) -> Limits:
    """The options that are given, over the limits of `before`."""
    given = {name: value for name, value in options.items() if value is not None}
    known = {} if before is None else before.model_dump(exclude_unset=True)
    return Limits.parse(known | given, source="the command line")


def describe(limits: Limits) -> str:
    """In a few words; empty without limits."""
    words = {
        "requests/min": limits.rpm_limit,
        "tokens/min": limits.tpm_limit,
        "at once": limits.max_parallel_requests,
        f"tokens/{limits.budget_duration}": None if limits.max_budget is None else f"{limits.max_budget:,.0f}",
        "stored": None if limits.max_stored_bytes is None else format_size(limits.max_stored_bytes),
        "jobs": limits.max_jobs,
        "workers": limits.max_workers,
        "least priority": limits.min_priority,
    }
    return ", ".join(f"{value} {name}" for name, value in words.items() if value is not None)
