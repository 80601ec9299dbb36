"""The steps in a run's events: where it is, how fast, and with how much memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from jobs.events.schema import Event
from serve_apps.console.live.series import Series

MOST_STEPS = 400


class Step(NamedTuple):
    """Figures of one step; None where its event has none. Seconds, bytes of the peak, MFU as a share."""

    step: int
    num_steps: int | None
    loss: float | None
    lr: float | None
    tokens_per_s: float | None
    mfu: float | None
    memory_bytes: float | None
    eta_s: float | None


class Progress:
    """Collects steps from events, an evenly thinned part of them and the last one."""

    def __init__(self) -> None:
        self._events = Series[Event](MOST_STEPS)  # of which few become a Step

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            if event.get("event") == "step" and isinstance(step := event.get("step"), int):
                self._events.add(step, event)

    def steps(self) -> tuple[Step, ...]:
        return tuple(_step(step, dict(event)) for step, event in self._events.values().items())


def _step(step: int, event: dict[str, Any]) -> Step:
    def figure(name: str) -> float | None:
        value = event.get(name)
        return value if isinstance(value, int | float) else None

    num_steps = event.get("num_steps")
    return Step(
        step,
        num_steps if isinstance(num_steps, int) else None,
        *(figure(name) for name in ("loss", "lr", "tokens_per_s", "mfu", "memory_bytes", "eta_s")),
    )
