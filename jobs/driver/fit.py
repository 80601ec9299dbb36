"""One run of Ray Train with its history: each event goes to the run's file, to its board, and to the caller."""

from __future__ import annotations

from collections.abc import Callable

import ray
from ray.train import Result, TrainingFailedError

from jobs.driver.trainer import Workload, build_trainer, cause
from jobs.events.messages import EventTail, first_line
from jobs.events.schema import Emit, Event
from jobs.events.sink import start_sink
from jobs.events.tensorboard import TensorBoardWriter
from jobs.runs.folders import RunFolder
from loray.errors import LorayError, TrainingError
from loray.settings import Settings


def fit(
    work: Workload, run: RunFolder, settings: Settings, emit: Emit, *, on_interrupt: Callable[[], None] = lambda: None
) -> Result:
    """Trains, from the run's last checkpoint if it has one. TrainingError where the workers could not be kept alive.

    The result's `return_value` is None, or why training gave up. `on_interrupt` is called at once where this thread is
    interrupted, and may raise.
    """

    def write_and_emit(event: Event) -> None:
        board.write(event)
        emit(event)

    has_board = "tensorboard" in work.spec.tracking
    run.mend()
    with (
        run.history() as history,
        TensorBoardWriter(history.board) as board,
        EventTail(history.events, write_and_emit if has_board else emit),
    ):
        sink = start_sink(history.events)
        try:
            return build_trainer(work, run, settings, sink).fit()
        except TrainingFailedError as e:
            error = cause(e)
            reason = str(error) if isinstance(error, LorayError) else first_line(error)
            raise TrainingError(
                f"training failed: {reason}; go on from the last checkpoint with --resume, details are in {run}"
            ) from e
        except KeyboardInterrupt:
            on_interrupt()
            raise
        finally:
            ray.kill(sink)
