"""The trackers of a run: TensorBoard, MLflow, Weights & Biases.

MLflow and wandb are imported only where a recipe names them. What they reach, and with which key, they read from their
own environment variables (MLFLOW_…, WANDB_…), which no recipe and no event shows.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tensorboardX import SummaryWriter

from jobs.events import Emit, Event, decode, figures, first_line
from loray.errors import LorayError, SpecError, TrainingError
from loray.spec import TrackerName, TrainSpec
from loray.telemetry import get_logger

log = get_logger(__name__)

_STEP = {
    "loss": "train/loss",
    "lr": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "skipped_steps": "train/skipped_steps",
    "tokens_per_s": "throughput/tokens_per_s",
    "mfu": "throughput/mfu",
    "memory_bytes": "memory/peak_bytes",
}
_FLUSH_S = 5  # of TensorBoard's files
_LONGEST = 6000  # characters of a parameter's value in MLflow
_MOST = 100  # parameters in one request to it


def scalars(event: Event) -> tuple[dict[str, float], int]:
    """Returns (values by tag, step) of an event; no values where it has none. A number that was not finite is left
    out.
    """
    match event["event"]:
        case "step":
            values: Mapping[str, Any] = event
            found = {tag: values.get(name) for name, tag in _STEP.items()}
            found |= {f"train/{name}": value for name, value in figures(event).items()}
        case "rollout":
            found = {f"rollout/{name}": value for name, value in event["metrics"].items()}
        case "eval":
            measured = {"loss": event["eval_loss"], **figures(event)}
            found = {f"eval/{name}_{event['subject']}": value for name, value in measured.items()}
        case _:
            return {}, 0
    return {tag: value for tag, value in found.items() if value is not None}, event["step"]


@contextmanager
def tensorboard(folder: Path) -> Iterator[Emit]:
    """Yields what writes an event to files in `folder`, until the `with` block ends. Not thread-safe.

    Restarted workers repeat the steps after their checkpoint; TensorBoard drops the earlier values of those steps.
    """
    writer: SummaryWriter | None = None

    def write(event: Event) -> None:
        nonlocal writer
        if event["event"] == "start":
            if writer is not None:
                writer.close()
            suffix, after = f".{event['pid']}", event["step"] + 1
            writer = SummaryWriter(str(folder), purge_step=after, flush_secs=_FLUSH_S, filename_suffix=suffix)
        elif writer is not None:
            values, step = scalars(event)
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


class TrackedRun(NamedTuple):
    """A run as trackers show it. `at` names it among all runs, so that a resumed run goes on in its tracker too.

    name   of the adapter, with its tenant
    sweep  of which it is a trial
    """

    name: str
    at: str
    recipe: TrainSpec
    sweep: str | None = None

    @property
    def parameters(self) -> dict[str, str]:
        """The recipe, by dotted names."""
        return dict(_flat(self.recipe.model_dump(mode="json"), ""))

    @property
    def tags(self) -> dict[str, str]:
        tags = {"loray.run": self.at, "loray.adapter": self.name, "loray.base": self.recipe.base}
        return tags if self.sweep is None else tags | {"loray.sweep": self.sweep}


def _flat(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, below in value.items():
            yield from _flat(below, f"{path}.{name}" if path else name)
    elif value is not None:
        yield path, str(value)


class Tracker(Protocol):
    """A run in a tracker. Its methods may raise any error of its library."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def tag(self, tags: Mapping[str, str]) -> None: ...

    def end(self, *, succeeded: bool) -> None: ...


def check_installed(names: Sequence[TrackerName]) -> None:
    """Raises SpecError with what to install where a tracker's library is missing."""
    for name in names:
        if name in _TRACKERS and find_spec(name) is None:
            raise SpecError(f"tracking: {name} is not installed on this machine: pip install 'loray[{name}]'")


class Trackers:
    """The open trackers of one run. One that fails is left out with a warning: training does not end for it."""

    def __init__(self, opened: Mapping[TrackerName, Tracker], emit: Emit) -> None:
        self._opened, self._emit = dict(opened), emit

    def emit(self, event: Event) -> None:
        """Tells the trackers, and the caller of `tracked`."""
        self.tell(event)
        self._emit(event)

    def tell(self, event: Event) -> None:
        values, step = scalars(event)
        if values:
            self._each(lambda tracker: tracker.log(values, step))
        if event["event"] == "published":
            tags = {"loray.version": event["label"], "loray.digest": event["digest"]}
            self._each(lambda tracker: tracker.tag(tags))

    def end(self, *, succeeded: bool) -> None:
        self._each(lambda tracker: tracker.end(succeeded=succeeded))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in tuple(self._opened.items()):
            try:
                call(tracker)
            except Exception as e:
                log.debug("%s failed", name, exc_info=True)
                log.warning("%s is told nothing more of this run: %s", name, e)
                del self._opened[name]


@contextmanager
def tracked(run: TrackedRun, emit: Emit = lambda event: None) -> Iterator[Trackers]:
    """Opens the trackers that the recipe names. TrainingError where one cannot be reached."""
    opened: dict[TrackerName, Tracker] = {}
    for name in run.recipe.tracking:
        try:
            if name in _TRACKERS:
                opened[name] = _TRACKERS[name](run)
        except LorayError:
            raise
        except Exception as e:
            raise TrainingError(f"tracking: {name} cannot be reached, or refuses: {e}") from e
    trackers = Trackers(opened, emit)
    try:
        yield trackers
    except BaseException:
        trackers.end(succeeded=False)
        raise
    trackers.end(succeeded=True)


def replay(run: TrackedRun, events: Path, board: Path, published: Event | None, emit: Emit) -> None:
    """Tells trackers and TensorBoard all that has happened in a run which is over, by the lines of its events. `emit`
    is told where that fails.
    """
    lines = events.read_text(encoding="utf-8").splitlines() if events.is_file() else []
    found = [event for line in lines if (event := decode(line)) is not None]
    try:
        with tracked(run) as trackers, tensorboard(board) as write:
            for event in found if published is None else [*found, published]:
                if "tensorboard" in run.recipe.tracking:
                    write(event)
                trackers.tell(event)
    except Exception as e:  # whatever a tracker's library raises
        log.debug("trackers are not told of %s", run.at, exc_info=True)
        emit({"event": "warning", "message": f"{run.at}: {first_line(e)}"})


class _MlflowRun:
    """The run that has the tag `loray.run`, or a new one with the recipe as its parameters."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "loray")
        experiment = self._client.get_experiment_by_name(name)
        at = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        found = self._client.search_runs([at], f"tags.`loray.run` = '{run.at}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(at, run_name=run.at, tags=run.tags).info.run_id
        parameters = [Param(key, value[:_LONGEST]) for key, value in run.parameters.items()]
        for first in range(0, len(parameters), _MOST):
            self._client.log_batch(self._id, params=parameters[first : first + _MOST])

    def log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def tag(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self._id, tags=[RunTag(name, value) for name, value in tags.items()])

    def end(self, *, succeeded: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if succeeded else "FAILED")


class _WandbRun:
    """The run whose id is made of `at`, with the recipe as its configuration."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "loray"),
            id=re.sub(r"[^\w.-]", "-", run.at)[-128:],
            name=run.at,
            group=run.sweep or run.name,
            config=run.parameters | run.tags,
            resume="allow",
            reinit="create_new",  # trials of a sweep may share a process
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})  # not as W&B's own step, which drops what a resumed run repeats

    def tag(self, tags: Mapping[str, str]) -> None:
        self._run.summary.update(dict(tags))

    def end(self, *, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


_TRACKERS: Mapping[TrackerName, Callable[[TrackedRun], Tracker]] = {"mlflow": _MlflowRun, "wandb": _WandbRun}
