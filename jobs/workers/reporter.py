"""The training loop's reporter on a Ray Train worker: checkpoints go through Ray, other events to the driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from jobs.events.sink import EventSender
from jobs.workers.checkpoints import CheckpointUploads
from jobs.workers.gauges import TrainingGauges, Utilisation, peak_memory
from loray.train.mesh import World


class RayReporter:
    """Reports checkpoints through Ray; rank 0 sends other events to the driver directly.

    Ray accepts one report per health check, which would delay every step.
    """

    def __init__(
        self,
        events: EventSender,
        uploads: CheckpointUploads,
        gauges: TrainingGauges,
        utilisation: Utilisation | None,
        world: World,
        device: torch.device,
    ) -> None:
        """`utilisation` is None on every rank but 0."""
        self._events, self._uploads, self._gauges, self._utilisation = events, uploads, gauges, utilisation
        self._world, self._device = world, device

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        if metrics["event"] == "checkpoint":
            self._uploads.add(metrics["step"], metrics["eval_loss"], checkpoint)
        elif self._utilisation is not None:
            self._events.send(self._measured(metrics, self._utilisation))
        if metrics["event"] == "step":
            self._gauges.set(memory_bytes=peak_memory(self._device))

    def _measured(self, metrics: dict[str, Any], utilisation: Utilisation) -> dict[str, Any]:
        match metrics["event"]:
            case "start":
                return metrics | utilisation._asdict()
            case "step":
                mfu = utilisation.mfu(metrics["tokens_per_s"], self._world.size)
                metrics = metrics | {"mfu": mfu, "memory_bytes": peak_memory(self._device)}
                self._gauges.set_step(metrics)
            case "eval" if metrics["subject"] == "adapter":
                self._gauges.set(eval_loss=metrics["eval_loss"])
        return metrics
