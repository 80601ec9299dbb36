"""The events of a run. Each is one JSON object; `event` says which one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NotRequired, TypedDict

from loray.spec import Subject

# Of DPO: means over pairs, by TRL's names.
RewardFigures = TypedDict(
    "RewardFigures",
    {
        "rewards/chosen": NotRequired[float | None],
        "rewards/rejected": NotRequired[float | None],
        "rewards/accuracies": NotRequired[float | None],
        "rewards/margins": NotRequired[float | None],
    },
)


class StartEvent(TypedDict):
    """Training starts, or resumes after `step`. Rank 0 adds why the dtype is what it is, and how MFU is
    computed (`jobs.workers.utilisation`).
    """

    event: Literal["start"]
    step: int
    num_steps: int
    num_parameters: int
    num_trainable: int
    trainable_share: float
    num_workers: int
    num_threads: int
    device: str
    dtype: str
    pid: int
    data: dict[str, Any]
    dtype_reason: NotRequired[str]
    flops_per_token: NotRequired[float]
    peak_flops: NotRequired[float]
    peak_source: NotRequired[str]


class StepEvent(RewardFigures):
    """One optimizer step. A loss or norm that is not finite is null in JSON. Rank 0 adds MFU, the peak FLOP/s of
    a worker that it is a share of, and peak memory.
    """

    event: Literal["step"]
    step: int
    num_steps: int
    epoch: int
    loss: float | None
    lr: float
    grad_norm: float | None
    tokens_per_s: float
    num_tokens: int
    skipped_steps: int
    eta_s: float
    mfu: NotRequired[float]
    peak_flops: NotRequired[float]
    memory_bytes: NotRequired[int]


class EvalEvent(RewardFigures):
    event: Literal["eval"]
    step: int
    subject: Subject
    eval_loss: float | None


class EarlyStopEvent(TypedDict):
    """The run ends here: `num_stale` evaluations in a row were no better than the best one before them."""

    event: Literal["early_stop"]
    step: int
    num_steps: int
    best_eval_loss: float | None
    num_stale: int


class CheckpointEvent(TypedDict):
    """A checkpoint; `path` is where it was uploaded to."""

    event: Literal["checkpoint"]
    step: int
    eval_loss: float | None
    path: NotRequired[str]


class WarningEvent(TypedDict):
    event: Literal["warning"]
    message: str


class WorkerLostEvent(TypedDict):
    event: Literal["worker_lost"]
    message: str


class MeasureEvent(TypedDict):
    """The evaluation before publishing begins."""

    event: Literal["measure"]
    tasks: list[str]


class PublishedEvent(TypedDict):
    """`refusal`: why the gate refused the aliases, None if it did not. `unmeasured`: why it could not be measured, and
    how to do it later, None if it was or was not to be. `evaluations`: as in the manifest.
    """

    event: Literal["published"]
    name: str
    version: int
    label: str
    digest: str
    nbytes: int
    aliases: list[str]
    refusal: NotRequired[str | None]
    unmeasured: NotRequired[str | None]
    step: int
    evaluations: NotRequired[list[dict[str, Any]]]


class TrialEvent(TypedDict):
    """A sweep's trial has changed: the fields are those of `jobs.sweeps.trials.TrialRecord`."""

    event: Literal["trial"]
    num_trials: int
    trial: int
    values: dict[str, str]
    status: str
    num_steps: int | None
    losses: list[list[float]]
    message: str


class SweepEvent(TypedDict):
    """All trials have ended. `folder` holds their records, and `picture` their losses; `best`: None if all failed.
    `keep_best`: trials rank by their lowest loss and not by their last one, as the recipe says.
    """

    event: Literal["sweep"]
    sweep: str
    folder: str
    picture: str
    best: int | None
    keep_best: bool


class ErrorEvent(TypedDict):
    """`kind`: the name of the error's class."""

    event: Literal["error"]
    kind: str
    message: str


LoopEvent = StartEvent | StepEvent | EvalEvent | EarlyStopEvent | CheckpointEvent
Event = (
    LoopEvent | WarningEvent | WorkerLostEvent | MeasureEvent | PublishedEvent | TrialEvent | SweepEvent | ErrorEvent
)
Emit = Callable[[Event], None]
