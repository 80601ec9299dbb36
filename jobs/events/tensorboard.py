"""A run's events as scalars for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from jobs.events.schema import Event

_STEP = {
    "loss": "train/loss",
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
            case "step":
                values: Mapping[str, Any] = event
                for name, tag in _STEP.items():
                    self._add(tag, values.get(name), event["step"])
            case "eval":
                self._add(f"eval/loss_{event['subject']}", event["eval_loss"], event["step"])

    def _add(self, tag: str, value: float | None, step: int) -> None:
        """`value` is None for a number that was not finite."""
        if self._writer is not None and value is not None:
            self._writer.add_scalar(tag, value, step)
