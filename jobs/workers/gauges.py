"""A worker's measurements while it trains: memory, and Ray's gauges for Prometheus."""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping
from typing import Any

import torch
from ray.util.metrics import Gauge

from jobs.events.schema import RewardFigures, StepEvent
from loray.spec import REWARDS
from loray.telemetry import TRAINING_LABELS, TRAINING_METRICS


class TrainingGauges:
    """The gauges `loray_train_…` of one worker. Ray's exposition of a node prefixes them: `ray_loray_train_…`."""

    def __init__(self, name: str, run: str, rank: int) -> None:
        tags = dict(zip(TRAINING_LABELS, (name, run, str(rank)), strict=True))
        self._gauges = {
            key: Gauge(metric.name, metric.help, metric.labels).set_default_tags(tags)
            for key, metric in TRAINING_METRICS.items()
        }

    def set(self, **values: float | None) -> None:
        """Sets gauges, named without `loray_train_`. A value that is not finite leaves its gauge unchanged."""
        for key, value in values.items():
            if value is not None and math.isfinite(value):
                self._gauges[f"train_{key}"].set(value)

    def set_step(self, event: StepEvent) -> None:
        self.set(
            step=event["step"],
            loss=event["loss"],
            learning_rate=event["lr"],
            grad_norm=event["grad_norm"],
            tokens_per_second=event["tokens_per_s"],
            mfu_ratio=event["mfu"],
            tokens=event["num_tokens"],
            skipped_steps=event["skipped_steps"],
        )
        self.set_rewards(event)

    def set_rewards(self, figures: RewardFigures, *, evaluated: bool = False) -> None:
        """Sets the gauges of DPO, of training or of the last evaluation; none without pairs."""
        values: Mapping[str, Any] = figures
        prefix = "eval_" if evaluated else ""
        self.set(**{f"{prefix}{name.replace('/', '_')}": values.get(name) for name in REWARDS})


def peak_memory(device: torch.device) -> int:
    """The largest number of bytes that this process has held: in the GPU's allocator, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
