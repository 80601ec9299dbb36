"""Metrics and errors, with the HTTP statuses that both APIs give errors."""

from __future__ import annotations

import re
from collections.abc import Iterable

from docs.site.markdown import table
from loray import errors
from loray.spec import FIGURES
from loray.telemetry import METRICS, TRAINING_METRICS, Metric, figure_metrics
from serve_apps.api import problems
from serve_apps.gateway.errors import failure_of

_ENTRY = re.compile(r"^[\s│├└─]*([A-Z]\w+)\s+(.+)$")


def metrics_page() -> str:
    """Metrics of serving and of training."""
    return "\n".join(
        [
            "# Metrics\n",
            "What `/metrics` of an endpoint has; [operations](../guide/operations.md) explains it.\n",
            _metrics(METRICS.values()),
            "## Of training\n",
            "Ray's nodes expose these, with the prefix `ray_`; all are gauges.\n",
            _metrics([*TRAINING_METRICS.values(), *figure_metrics(FIGURES).values()]),
        ]
    )


def _metrics(shown: Iterable[Metric]) -> str:
    rows = [(f"`{m.name}`", m.kind, ", ".join(f"`{label}`" for label in m.labels), m.help, _buckets(m)) for m in shown]
    return table(("name", "type", "labels", "meaning", "buckets"), rows)


def _buckets(metric: Metric) -> str:
    return ", ".join(f"{bound:g}" for bound in metric.buckets)


def errors_page() -> str:
    """Every class of error, its meaning, and how each API answers it."""
    assert errors.__doc__ is not None
    found = [match for line in errors.__doc__.splitlines() if (match := _ENTRY.match(line))]
    meanings = {match[1]: match[2] for match in found}
    rows: list[tuple[str, ...]] = []
    for name, error in vars(errors).items():
        if isinstance(error, type) and issubclass(error, errors.LorayError):
            failure = failure_of(_made(error))
            code = f" `{failure.error.code}`" if failure.error.code else ""
            base = "" if error is errors.LorayError else f"`{error.__bases__[0].__name__}`"
            rows.append(
                (f"`{name}`", base, meanings.get(name, ""), f"{failure.status}{code}", str(problems.status_of(error)))
            )
    return "\n".join(
        [
            "# Errors\n",
            "Clients and commands raise these classes of `loray.errors`. The endpoint `/v1` answers with OpenAI's "
            "error object and a `code`, the catalog's API with a problem whose `type` names the class.\n",
            table(("error", "kind of", "meaning", "/v1", "/api/v1"), rows),
        ]
    )


def _made(error: type[errors.LorayError]) -> errors.LorayError:
    """One of its kind; some have the seconds after which to try again."""
    if error in (errors.Overloaded, errors.AdapterQuarantined, errors.BaseStarting):
        return error("", 1.0)
    return error("")
