"""A run in Weights & Biases, in the project WANDB_PROJECT or `loray`; WANDB_MODE=offline keeps it on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import wandb

from jobs.tracking.trackers import TrackedRun, Tracker


class _WandbRun:
    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})  # not as W&B's own step, which drops what a resumed run repeats

    def tag(self, tags: Mapping[str, str]) -> None:
        self._run.summary.update(dict(tags))

    def end(self, *, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


def open_run(run: TrackedRun) -> Tracker:
    """The run whose id is made of `at`, with the recipe as its configuration."""
    opened = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "loray"),
        id=re.sub(r"[^\w.-]", "-", run.at)[-128:],
        name=run.at,
        group=run.sweep or run.name,
        config=run.parameters | run.tags,
        resume="allow",
        reinit="create_new",  # trials of a sweep may share a process
        settings=wandb.Settings(silent=True, console="off"),
    )
    opened.define_metric("*", step_metric="step")
    return _WandbRun(opened)
