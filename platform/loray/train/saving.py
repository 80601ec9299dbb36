"""When a run's checkpoints are due, and writing them while training goes on."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loray.errors import TrainingError
from loray.spec import CheckpointSpec
from loray.train.checkpoint import Snapshot, write
from loray.train.mesh import World
from loray.train.reporting import Metrics, Reporter

Clock = Callable[[], float]
WRITTEN = "written-"  # before the step in the name of a checkpoint that is whole, and not reported yet
_UNDER_WAY, _WRITTEN, _FAILED = 0.0, 1.0, 2.0


class Signals(NamedTuple):
    """What rank 0 tells the others in a sum that they take anyway; other ranks add zeros.

    overdue  1 where the last checkpoint was begun `interval_minutes` ago or earlier
    status   of the checkpoint that is being written
    """

    overdue: float = 0.0
    status: float = _UNDER_WAY


class _Pending(NamedTuple):
    """A checkpoint that is not reported yet. `written` is the folder to come, None on ranks that write none."""

    metrics: Metrics
    written: Future[Path] | None


class Checkpoints:
    """Writes one checkpoint at a time, in a thread of rank 0; the next one waits for it.

    A checkpoint is reported, on all ranks at the same step, once it is written. All ranks make the same calls.
    """

    def __init__(
        self,
        spec: CheckpointSpec,
        reporter: Reporter,
        workdir: Path,
        world: World,
        device: torch.device,
        clock: Clock = time.monotonic,
    ) -> None:
        minutes = spec.interval_minutes
        self._interval_s = float("inf") if minutes is None else 60 * minutes
        self._reporter, self._workdir, self._world, self._device = reporter, workdir, world, device
        self._clock, self._begun_at = clock, clock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None

    def signals(self) -> Signals:
        if self._world.rank:
            return Signals()
        return Signals(float(self._clock() - self._begun_at >= self._interval_s), self._status())

    def take(self, status: float) -> None:
        """Report the checkpoint under way if it is written. `status` is the sum over ranks of the signal.

        Raises TrainingError, on all ranks, where it could not be written.
        """
        pending = self._pending
        if pending is None or status == _UNDER_WAY:
            return
        self._pending = None
        if status == _FAILED:
            error = None if pending.written is None else str(pending.written.exception())
            (reason, *_) = self._world.gather(error)
            raise TrainingError(
                f"the checkpoint of step {pending.metrics['step']} could not be written to {self._workdir}: {reason}; "
                "see that there is space and that it may be written to, then go on from the checkpoint before with "
                "--resume"
            )
        folder = None if pending.written is None else pending.written.result()
        try:
            self._reporter.report(pending.metrics, folder)
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def begin(self, snapshot: Snapshot | None, *, step: int, eval_loss: float | None) -> None:
        """Start to write `snapshot`, which only rank 0 has. The checkpoint before must be finished."""
        assert self._pending is None, "the checkpoint before is finished"
        self._begun_at = self._clock()
        metrics: dict[str, Any] = {"event": "checkpoint", "step": step, "eval_loss": eval_loss}
        written = None if snapshot is None else self._thread.submit(self._write, snapshot, step)
        self._pending = _Pending(metrics, written)

    def finish(self) -> None:
        """Wait until the checkpoint under way is written, and report it. Raises as `take` does."""
        if self._pending is None:
            return
        if self._pending.written is not None:
            self._pending.written.exception()  # waits
        (status,) = self._world.sum(self._status(), device=self._device)
        self.take(status)

    def close(self) -> None:
        """Wait for the thread. A checkpoint that it has written and that is not reported stays in the folder."""
        self._thread.shutdown()

    def _status(self) -> float:
        written = None if self._pending is None else self._pending.written
        if written is None or not written.done():
            return _UNDER_WAY
        return _WRITTEN if written.exception() is None else _FAILED

    def _write(self, snapshot: Snapshot, step: int) -> Path:
        """A folder gets its name when it is whole: a worker that replaces a lost one may use it."""
        partial = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=self._workdir))
        try:
            write(partial, snapshot)
            return partial.rename(self._workdir / f"{WRITTEN}{step:06d}")
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
