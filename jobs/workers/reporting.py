"""Reports of a worker: its checkpoints, events and gauges."""

from __future__ import annotations

import math
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event as ThreadingEvent
from typing import Any, NamedTuple, cast

import ray
import ray.train
import torch
from pyarrow import fs as pafs
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.train import Checkpoint, CheckpointUploadMode
from ray.util.metrics import Gauge

from jobs.events import EvalEvent, Event, LoopEvent, StartEvent, StepEvent, encode, figures
from jobs.runs.folders import PREFIX, metrics_of, name_of, step_of
from loray.errors import IntegrityError, LorayError
from loray.spec import FIGURES
from loray.telemetry import TRAINING_LABELS, TRAINING_METRICS, figure_metrics, get_logger
from loray.train.checkpoint import WRITTEN, read_state
from loray.train.mesh import World

log = get_logger(__name__)

_SAMPLING_SHARE = 0.005  # of a run's time
_GAUGES = {  # of a step's event, without `train_`
    "step": "step",
    "loss": "loss",
    "lr": "learning_rate",
    "grad_norm": "grad_norm",
    "tokens_per_s": "tokens_per_second",
    "mfu": "mfu_ratio",
    "num_tokens": "tokens",
    "skipped_steps": "skipped_steps",
}


class EventSender:
    """Sends events to the sink in order, one at a time: a call waits until the event before it has been written."""

    def __init__(self, sink: ActorHandle) -> None:
        self._sink = sink
        self._sent: ObjectRef | None = None

    def send(self, event: Event) -> None:
        self.flush()
        self._sent = self._sink.append.remote(encode(event, time.time()))

    def flush(self) -> None:
        """Waits until every event has been written."""
        if self._sent is not None:
            ray.get(self._sent)
            self._sent = None


class CheckpointUploads:
    """The uploads of one worker's checkpoints. The end of its `with` block waits for the last upload.

    Rank 0 writes a checkpoint to its disk, and Ray Train uploads it from a thread: one at a time, in order. A
    checkpoint stays on the disk until the next one is written. If rank 0 is lost before an upload has begun or
    finished, the worker that replaces it on the same machine finds the checkpoint there and uploads it first.

    `folder` contains rank 0's checkpoints and nothing else; other ranks write none. The uploading thread calls
    `arrived(seconds)` with the time from writing a checkpoint to the end of its upload.
    """

    def __init__(self, folder: Path, arrived: Callable[[float], None]) -> None:
        self._folder, self._arrived = folder, arrived
        self._idle = ThreadingEvent()
        self._idle.set()
        self._failed = False
        self._written_at = 0.0

    def __enter__(self) -> CheckpointUploads:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        """Removes the folder, except after an error that makes Ray Train start another worker, which needs it."""
        if error is None or isinstance(error, LorayError):
            self._idle.wait()
            if not self._failed:
                shutil.rmtree(self._folder)

    def latest(self, world: World) -> Checkpoint | None:
        """Returns the checkpoint to resume from: the last that Ray Train knows, or a later one that a lost worker left.

        A collective call. Checkpoints that the lost worker uploaded and Ray Train does not know are removed.
        """
        known = ray.train.get_checkpoint()
        left = None
        if world.rank == 0:
            known_step = -1 if known is None else step_of(Path(known.path))
            left = self._left_behind(known_step)
            _remove_unknown(known_step)
        (name, *_) = world.gather(None if left is None else left.name)
        if name is None:
            return known
        saved, metrics = None, {}
        if left is not None:
            state = read_state(left)
            log.warning("the checkpoint of step %d was not uploaded when its worker was lost; doing so now", state.step)
            saved, metrics = Checkpoint.from_directory(left), metrics_of(state.step, state.eval_loss)
        ray.train.report(metrics, checkpoint=saved, checkpoint_dir_name=name)
        world.gather(None)  # waits until rank 0's upload has finished
        storage = ray.train.get_context().get_storage()
        return Checkpoint(storage.build_checkpoint_path_from_name(name), storage.storage_filesystem)

    def add(self, step: int, eval_loss: float | None, written: Path | None) -> None:
        """Waits for the upload before, takes `written`, a subfolder of `folder`, and starts its upload.

        Every rank calls this equally often; only rank 0 passes a folder.
        """
        self._idle.wait()
        checkpoint = None
        if written is not None:
            kept = written.rename(self._folder / name_of(step))
            self._remove_all_but(kept)
            checkpoint = Checkpoint.from_directory(kept)
            self._written_at = time.perf_counter()
            self._idle.clear()
        ray.train.report(
            metrics_of(step, eval_loss),
            checkpoint=checkpoint,
            checkpoint_dir_name=name_of(step),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=self._upload,
            delete_local_checkpoint_after_upload=False,
        )

    def _upload(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        try:
            stored = ray.train.get_context().get_storage().persist_current_checkpoint(checkpoint, name)
            self._arrived(time.perf_counter() - self._written_at)
            return stored
        except BaseException:
            self._failed = True  # Ray Train replaces the workers
            raise
        finally:
            self._idle.set()

    def _left_behind(self, known_step: int) -> Path | None:
        """Returns the last complete checkpoint of a step after `known_step`, and removes all else in the folder."""
        for path in self._folder.glob(f"{WRITTEN}*"):  # not reported before the worker was lost
            path.rename(self._folder / name_of(int(path.name.removeprefix(WRITTEN))))
        for path in sorted(self._folder.glob(f"{PREFIX}*"), key=step_of, reverse=True):
            if step_of(path) > known_step and _is_complete(path):
                self._remove_all_but(path)
                return path
        self._remove_all_but(None)
        return None

    def _remove_all_but(self, kept: Path | None) -> None:
        for path in self._folder.iterdir():
            if path != kept:
                shutil.rmtree(path)


def _remove_unknown(known_step: int) -> None:
    """Removes from the run's storage the checkpoints after the last one that Ray Train knows, complete or not.

    Ray Train would never remove them.
    """
    storage = ray.train.get_context().get_storage()
    for found in storage.storage_filesystem.get_file_info(pafs.FileSelector(storage.experiment_fs_path)):
        if found.base_name.startswith(PREFIX) and step_of(Path(found.path)) > known_step:
            storage.storage_filesystem.delete_dir(found.path)


def _is_complete(checkpoint: Path) -> bool:
    try:
        read_state(checkpoint)
    except IntegrityError:
        return False
    return True


class TrainingGauges:
    """The gauges `loray_train_…` of one worker. Ray's exposition of a node prefixes them: `ray_loray_train_…`."""

    def __init__(self, name: str, run: str, rank: int) -> None:
        tags = dict(zip(TRAINING_LABELS, (name, run, str(rank)), strict=True))
        self._gauges = {
            key: Gauge(metric.name, metric.help, metric.labels).set_default_tags(tags)
            for key, metric in {**TRAINING_METRICS, **figure_metrics(FIGURES)}.items()
        }

    def set(self, **values: float | None) -> None:
        """Sets gauges, named without `loray_train_`. A value that is not finite leaves its gauge unchanged."""
        for key, value in values.items():
            if value is not None and math.isfinite(value):
                self._gauges[f"train_{key}"].set(value)

    def set_step(self, event: StepEvent) -> None:
        """Sets the gauges of a step, and of its objective's metrics."""
        values: Mapping[str, Any] = event
        self.set(**{gauge: values.get(name) for name, gauge in _GAUGES.items()})
        self.set_figures(event)

    def set_figures(self, event: StepEvent | EvalEvent, prefix: str = "") -> None:
        """Sets the gauges of the objective's metrics, of a step or an evaluation."""
        self.set(**{f"{prefix}{name.replace('/', '_')}": value for name, value in figures(event).items()})


def peak_memory(device: torch.device) -> int:
    """Returns the largest number of bytes that this process has held: in the GPU's allocator, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


class Peak:
    """The peak of a worker's device: the setting LORAY_PEAK_TFLOPS, or the most that was measured so far.

    What else runs on the machine makes a sample too low and never too high, so the peak only rises, by further samples.
    One is due as soon as all of them together take `_SAMPLING_SHARE` of the time, and ten times as often while steps
    attain more than the peak. Such a step is its own peak and no other's: the operations of short rows are
    overestimated. A setting stays, and a step that attains more shows that it is wrong.
    """

    def __init__(
        self,
        first: float | Callable[[], float],
        again: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`first`: the setting in FLOP/s, or measures them before training with matrix products; `again` measures them
        between steps, None: it stays.
        """
        self._again, self._clock = again, clock
        self._began = clock()
        self.source, self.flops = ("measured", first()) if callable(first) else ("setting", first)
        self._cost = clock() - self._began  # of one sample, in seconds
        self._spent = 0.0

    def compare(self, attained: float) -> float:
        """Returns the FLOP/s with which a step that attained so many is compared. Called between steps."""
        if self.source == "setting":
            return self.flops
        share = _SAMPLING_SHARE * (10 if attained > self.flops else 1)
        if self._again is not None and self._spent + self._cost <= share * (self._clock() - self._began):
            before = self._clock()
            self.flops = max(self.flops, self._again())
            self._cost = self._clock() - before
            self._spent += self._cost
        return max(self.flops, attained)


class Utilisation(NamedTuple):
    """Model FLOPs utilisation. `flops_per_token` is of forward and backward pass, without recomputation."""

    flops_per_token: float
    peak: Peak

    def mfu(self, tokens_per_s: float, num_workers: int) -> float:
        """Returns the MFU of a step that was just taken. At most 1 where the peak is measured."""
        attained = tokens_per_s * self.flops_per_token / num_workers
        return attained / self.peak.compare(attained)


@dataclass(frozen=True)
class RayReporter:
    """Reports checkpoints through Ray; rank 0 sends other events to the driver directly.

    Ray accepts one report per health check, which would delay every step.

    utilisation   None on every rank but 0
    dtype_reason  why the recipe's dtype is what it is
    """

    events: EventSender
    uploads: CheckpointUploads
    gauges: TrainingGauges
    utilisation: Utilisation | None
    world: World
    device: torch.device
    dtype_reason: str

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        event = cast("LoopEvent", metrics)
        if event["event"] == "checkpoint":
            self.uploads.add(event["step"], event["eval_loss"], checkpoint)
        elif self.utilisation is not None:
            self.events.send(self._measured(event, self.utilisation))
        if event["event"] == "step":
            self.gauges.set(memory_bytes=peak_memory(self.device))

    def _measured(self, event: LoopEvent, utilisation: Utilisation) -> LoopEvent:
        """Adds MFU and memory to the event, which are also set as gauges."""
        match event["event"]:
            case "start":
                start: StartEvent = {
                    **event,
                    "dtype_reason": self.dtype_reason,
                    "flops_per_token": utilisation.flops_per_token,
                    "peak_flops": utilisation.peak.flops,
                    "peak_source": utilisation.peak.source,
                }
                return start
            case "step":
                mfu = utilisation.mfu(event["tokens_per_s"], self.world.size)
                step: StepEvent = {
                    **event,
                    "mfu": mfu,
                    "peak_flops": utilisation.peak.flops,
                    "memory_bytes": peak_memory(self.device),
                }
                self.gauges.set_step(step)
                return step
            case "eval" if event["subject"] == "adapter":
                self.gauges.set(eval_loss=event["eval_loss"])
                self.gauges.set_figures(event, "eval_")
        return event
