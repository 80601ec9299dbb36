"""A run's checkpoints as Ray Train knows them: their names, the metrics that rank them, and the file that lists them.

Ray Train keeps that list, its snapshot, in one file, which it overwrites with each checkpoint. Where that write was cut
off, or somebody has removed a checkpoint by hand, Ray Train refuses the whole run; `mend` lists what is there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from loray.adapters.peft_format import read_tensors
from loray.errors import LorayError
from loray.files import replacing
from loray.telemetry import get_logger
from loray.train.checkpoint import ADAPTER, RunState, read_optimizer, read_state

log = get_logger(__name__)

SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train writes it with the first checkpoint
SCORE = "score"  # the metric by which Ray ranks checkpoints
PREFIX = "step_"  # of their folders


def score(eval_loss: float | None) -> float:
    """The metric that ranks a checkpoint; lower is better.

    It is finite, because Ray writes it into JSON. Checkpoints that were not evaluated come last.
    """
    return sys.float_info.max if eval_loss is None else eval_loss


def metrics_of(step: int, eval_loss: float | None) -> dict[str, Any]:
    return {"event": "checkpoint", "step": step, "eval_loss": eval_loss, SCORE: score(eval_loss)}


def name_of(step: int) -> str:
    return f"{PREFIX}{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def mend(run: Path) -> None:
    """Writes the snapshot of the run in the folder `run` anew, of all checkpoints that are whole, where Ray Train could
    not read it or would miss one that it names. Nothing changes where it is sound, or there is no checkpoint.
    """
    if _is_sound(run):
        return
    whole = {step_of(path): state for path in run.glob(f"{PREFIX}*") if (state := _state(path)) is not None}
    if not whole:
        return
    steps = ", ".join(map(str, sorted(whole)))
    log.warning("the list of checkpoints in %s is missing or damaged; it is made anew, of steps %s", run, steps)
    with replacing(run / SNAPSHOT) as file:
        file.write(_snapshot(whole).encode())


def _is_sound(run: Path) -> bool:
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState  # private

    try:
        known = _CheckpointManagerState.model_validate_json((run / SNAPSHOT).read_bytes())
    except (OSError, ValueError):  # pydantic's errors are ValueErrors
        return False
    return all((run / result.checkpoint_dir_name).is_dir() for result in known.checkpoint_results)


def _state(checkpoint: Path) -> RunState | None:
    """None where a file is missing or was not written to its end."""
    try:
        read_optimizer(checkpoint)
        read_tensors(checkpoint / ADAPTER)
        return read_state(checkpoint)
    except LorayError as e:
        log.warning("%s is left out: %s", checkpoint, e)
        return None


def _snapshot(states: dict[int, RunState]) -> str:
    """As Ray Train's own: the best checkpoint last where they are ranked, else the latest."""
    from ray.train.v2._internal.execution.checkpoint import checkpoint_manager as theirs  # private: no public way

    steps = sorted(states)
    results = {
        step: theirs._TrainingResultState(
            checkpoint_dir_name=name_of(step), metrics=metrics_of(step, states[step].eval_loss)
        )
        for step in steps
    }
    if states[steps[-1]].recipe.evaluation.keep_best:
        ordered = sorted(steps, key=lambda step: score(states[step].eval_loss), reverse=True)
    else:
        ordered = steps
    made = theirs._CheckpointManagerState(
        checkpoint_results=[results[step] for step in ordered],
        checkpoint_report_indices=[steps.index(step) for step in ordered],
        latest_checkpoint_result=results[steps[-1]],
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(steps),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    return str(made.model_dump_json())
