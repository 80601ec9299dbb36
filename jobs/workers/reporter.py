"""The training loop's reporter on a Ray Train worker: checkpoints go through Ray, other events to the driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from jobs.events.schema import LoopEvent, StartEvent, StepEvent
from jobs.events.sink import EventSender
from jobs.workers.checkpoints import CheckpointUploads
from jobs.workers.gauges import TrainingGauges, peak_memory
from jobs.workers.utilisation import Utilisation
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
        dtype_reason: str,
    ) -> None:
        """`utilisation` is None on every rank but 0. `dtype_reason`: why the recipe's dtype is what it is."""
        self._events, self._uploads, self._gauges, self._utilisation = events, uploads, gauges, utilisation
        self._world, self._device, self._dtype_reason = world, device, dtype_reason

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        event = cast("LoopEvent", metrics)
        if event["event"] == "checkpoint":
            self._uploads.add(event["step"], event["eval_loss"], checkpoint)
        elif self._utilisation is not None:
            self._events.send(self._measured(event, self._utilisation))
        if event["event"] == "step":
            self._gauges.set(memory_bytes=peak_memory(self._device))

    def _measured(self, event: LoopEvent, utilisation: Utilisation) -> LoopEvent:
        """The event with MFU and memory, which are also set as gauges."""
        match event["event"]:
            case "start":
                start: StartEvent = {
                    **event,
                    "dtype_reason": self._dtype_reason,
                    "flops_per_token": utilisation.flops_per_token,
                    "peak_flops": utilisation.peak.flops,
                    "peak_source": utilisation.peak.source,
                }
                return start
            case "step":
                mfu = utilisation.mfu(event["tokens_per_s"], self._world.size)
                step: StepEvent = {
                    **event,
                    "mfu": mfu,
                    "peak_flops": utilisation.peak.flops,
                    "memory_bytes": peak_memory(self._device),
                }
                self._gauges.set_step(step)
                return step
            case "eval" if event["subject"] == "adapter":
                self._gauges.set(eval_loss=event["eval_loss"])
                self._gauges.set_rewards(event, evaluated=True)
        return event
