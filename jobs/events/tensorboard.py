"""A run's events as scalars for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from jobs.events.schema import Event
from loray.spec import REWARDS

_STEP = {
    "loss": "train/loss",
    **{name: f"train/{name}" for name in REWARDS},
    "lr": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "skipped_steps": "train/skipped_steps",
    "tokens_per_s": "throughput/tokens_per_s",
    "mfu": "throughput/mfu",
    "memory_bytes": "memory/peak_bytes",
}
_FLUSH_S = 5


class TensorBoardWriter:
    """Writes event files to `folder` until the `with` block ends. Not thread-safe.

    Restarted workers repeat the steps after their checkpoint; TensorBoard drops the earlier values of those steps.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def __enter__(self) -> TensorBoardWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, event: Event) -> None:
        match event["event"]:
            case "start":
                if self._writer is not None:
                    self._writer.close()
                self._writer = SummaryWriter(
                    str(self._folder),
                    purge_step=event["step"] + 1,
                    flush_secs=_FLUSH_S,
                    filename_suffix=f".{event['pid']}",
                )
            case _ if self._writer is not None:
                values, step = scalars(event)
                for tag, value in values.items():
                    self._writer.add_scalar(tag, value, step)


def scalars(event: Event) -> tuple[dict[str, float], int]:
    """(values by tag, step) of an event; no values where it has none. A number that was not finite is left out."""
    match event["event"]:
        case "step":
            values: Mapping[str, Any] = event
            found = {tag: values.get(name) for name, tag in _STEP.items()}
            return {tag: value for tag, value in found.items() if value is not None}, event["step"]
        case "eval" if event["eval_loss"] is not None:
            figures: Mapping[str, Any] = event
            measured = {"loss": event["eval_loss"]} | {name: figures.get(name) for name in REWARDS}
            tags = {f"eval/{name}_{event['subject']}": value for name, value in measured.items()}
            return {tag: value for tag, value in tags.items() if value is not None}, event["step"]
    return {}, 0
