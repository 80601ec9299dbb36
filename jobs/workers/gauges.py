"""What a worker tells of its training while it runs: to the driver in events, to Prometheus through Ray's gauges."""

from __future__ import annotations

import math
import resource
from typing import Any, NamedTuple

import torch
from ray.util.metrics import Gauge

from loray.telemetry import TRAINING_LABELS, TRAINING_METRICS


class Utilisation(NamedTuple):
    """What model FLOPs utilisation is reckoned with. `peak_flops` is one worker's, in FLOP/s; `peak_source` says where
    it comes from: "measured" with a matrix product on this device, or the "setting" LORAY_PEAK_TFLOPS.
    """

    flops_per_token: float
    peak_flops: float
    peak_source: str

    def mfu(self, tokens_per_s: float, num_workers: int) -> float:
        return tokens_per_s * self.flops_per_token / (self.peak_flops * num_workers)


class TrainingGauges:
    """`loray_train_…` of one worker, which a node's exposition calls `ray_loray_train_…`."""

    def __init__(self, name: str, run: str, rank: int) -> None:
        tags = dict(zip(TRAINING_LABELS, (name, run, str(rank)), strict=True))
        self._gauges = {
            key: Gauge(metric.name, metric.help, metric.labels).set_default_tags(tags)
            for key, metric in TRAINING_METRICS.items()
        }

    def set(self, **values: float | None) -> None:
        """By the metric's name without `loray_train_`. What is not finite is left as it was."""
        for key, value in values.items():
            if value is not None and math.isfinite(value):
                self._gauges[f"train_{key}"].set(value)

    def set_step(self, event: dict[str, Any]) -> None:
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


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has had at once: in the GPU's allocator, or resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
