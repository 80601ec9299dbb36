"""What a run tells while it trains, as `loray.train.checkpoint.Reporter` takes it, and the time that it has left."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import NamedTuple

import torch

from loray.spec import Subject
from loray.train.checkpoint import Metrics, RunState
from loray.train.data.rows import Dataset
from loray.train.model import ParameterCount


def is_due(step: int, num_steps: int, interval: int | None) -> bool:
    """Say whether what is done every `interval` steps, and at the end, is due after `step`."""
    return step == num_steps or (interval is not None and step % interval == 0)


class HeldOut(NamedTuple):
    """`loss` is the mean, nan where a logit is not finite; `metrics` are the objective's further figures."""

    loss: float
    metrics: dict[str, float]


def start_event(
    state: RunState, num_steps: int, parameters: ParameterCount, data: Dataset, num_workers: int, device: torch.device
) -> Metrics:
    return {
        "event": "start",
        "num_parameters": parameters.total,
        "num_trainable": parameters.trainable,
        "trainable_share": parameters.trainable / parameters.total,
        "num_threads": torch.get_num_threads(),
        "pid": os.getpid(),
        "data": asdict(data.report),
        "step": state.step,
        "num_steps": num_steps,
        "num_workers": num_workers,
        "device": str(device),
        "dtype": state.recipe.chosen_dtype,
    }


def step_event(
    state: RunState,
    num_steps: int,
    *,
    loss: float,
    metrics: Mapping[str, float],
    lr: float,
    grad_norm: float,
    tokens_per_s: float,
    eta_s: float,
) -> Metrics:
    return {
        "event": "step",
        **state.progress,
        "num_steps": num_steps,
        "loss": loss,
        **metrics,
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens_per_s": tokens_per_s,
        "eta_s": eta_s,
    }


def eval_event(step: int, subject: Subject, measured: HeldOut) -> Metrics:
    return {"event": "eval", "step": step, "subject": subject, "eval_loss": measured.loss, **measured.metrics}


class TimeLeft:
    """Estimates the seconds until a run has ended, by what its steps and evaluations took so far.

    num_steps        of the run
    interval         steps from one evaluation to the next; None: nothing is evaluated
    eval_tokens      of an evaluation
    measured_tokens  that go through models after the last step
    """

    def __init__(self, num_steps: int, interval: int | None, eval_tokens: int, measured_tokens: int) -> None:
        self.num_steps, self.interval = num_steps, interval
        self.eval_tokens, self.measured_tokens = eval_tokens, measured_tokens
        self._steps_s = self._evals_s = self._since_step_s = 0.0
        self._num_steps = self._num_tokens = self._num_evals = 0

    def stepped(self, seconds: float, num_tokens: int) -> None:
        """A step has ended `seconds` after the one before, which the evaluations between them took too."""
        self._steps_s += max(0.0, seconds - self._since_step_s)
        self._num_steps, self._num_tokens = self._num_steps + 1, self._num_tokens + num_tokens
        self._since_step_s = 0.0

    def evaluated(self, seconds: float) -> None:
        self._evals_s, self._num_evals = self._evals_s + seconds, self._num_evals + 1
        if self._num_steps:  # what is measured before the first step is no part of its time
            self._since_step_s += seconds

    def after(self, step: int) -> float:
        """The time that is left after a step, before what is evaluated then."""
        step_s = self._steps_s / self._num_steps
        if not self._num_evals:  # a pass forward is a third of a step
            return (self.num_steps - step) * step_s + self.measured_tokens * self._steps_s / self._num_tokens / 3
        eval_s = self._evals_s / self._num_evals
        measuring_s = self.measured_tokens * eval_s / self.eval_tokens
        return (self.num_steps - step) * step_s + self._num_evaluations(step) * eval_s + measuring_s

    def _num_evaluations(self, step: int) -> int:
        """Those due after this step and later ones; the last step is evaluated whatever the interval."""
        if self.interval is None:
            return 0
        by_interval = self.num_steps // self.interval - (step - 1) // self.interval
        return by_interval + (self.num_steps % self.interval > 0)
