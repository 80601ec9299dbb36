"""Checkpoints on their way from the first worker to the run's storage, while training goes on.

A checkpoint is written to the worker's disk, and from there Ray Train uploads it from a thread: one at a time, in
order, and the end of training waits for the last. It stays on the disk until the next one is there. What a lost worker
had not handed in yet, the worker that takes its place on the same machine finds there, and hands in first.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import ray.train
from pyarrow import fs as pafs
from ray.train import Checkpoint, CheckpointUploadMode

from loray.errors import IntegrityError, LorayError
from loray.telemetry import get_logger
from loray.train.checkpoint import read_state
from loray.train.mesh import World

log = get_logger(__name__)

SCORE = "score"  # what Ray ranks checkpoints by
_PREFIX = "step_"


def score(eval_loss: float | None) -> float:
    """Finite, as Ray's snapshot must hold it in JSON; checkpoints that were not evaluated come last."""
    return sys.float_info.max if eval_loss is None else eval_loss


class CheckpointUploads:
    """Of one worker, to be used in a `with` block, whose end waits for the last one. `folder` is where rank 0's
    checkpoints lie, and nothing else; the other ranks have none.

    `arrived(seconds)` is called, from the uploading thread, with what a checkpoint took since it was written.
    """

    def __init__(self, folder: Path, arrived: Callable[[float], None]) -> None:
        self._folder, self._arrived = folder, arrived
        self._idle = Event()
        self._idle.set()
        self._failed = False
        self._written_at = 0.0

    def __enter__(self) -> CheckpointUploads:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        """After a LorayError no other worker follows. After any other it needs what lies here."""
        if error is None or isinstance(error, LorayError):
            self._idle.wait()
            if not self._failed:
                shutil.rmtree(self._folder)

    def latest(self, world: World) -> Checkpoint | None:
        """What to go on from: the last checkpoint that Ray Train knows, or a later one that a lost worker has left
        here. A collective call. What else that worker had uploaded, and Ray does not know, is removed.
        """
        known = ray.train.get_checkpoint()
        left = None
        if world.rank == 0:
            known_step = -1 if known is None else _step(Path(known.path))
            left = self._left_behind(known_step)
            _remove_unknown(known_step)
        (name, *_) = world.gather(None if left is None else left.name)
        if name is None:
            return known
        saved, metrics = None, {}
        if left is not None:
            state = read_state(left)
            log.warning("the checkpoint of step %d was not uploaded when its worker was lost; doing so now", state.step)
            saved, metrics = Checkpoint.from_directory(left), _metrics(state.step, state.eval_loss)
        ray.train.report(metrics, checkpoint=saved, checkpoint_dir_name=name)
        world.gather(None)  # rank 0 is here when its checkpoint has arrived; the others have nothing to wait for
        storage = ray.train.get_context().get_storage()
        return Checkpoint(storage.build_checkpoint_path_from_name(name), storage.storage_filesystem)

    def add(self, step: int, eval_loss: float | None, written: Path | None) -> None:
        """Take the folder `written`, a subfolder of `folder`, and return as soon as the one before has arrived.

        Every rank calls this equally often; rank 0 alone has a folder.
        """
        self._idle.wait()
        checkpoint = None
        if written is not None:
            kept = written.rename(self._folder / _name(step))
            self._remove_all_but(kept)
            checkpoint = Checkpoint.from_directory(kept)
            self._written_at = time.perf_counter()
            self._idle.clear()
        ray.train.report(
            _metrics(step, eval_loss),
            checkpoint=checkpoint,
            checkpoint_dir_name=_name(step),
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
        """The last whole checkpoint of a step after `known_step`. All else that lies there is removed."""
        for path in sorted(self._folder.glob(f"{_PREFIX}*"), reverse=True):
            if _step(path) > known_step and _is_whole(path):
                self._remove_all_but(path)
                return path
        self._remove_all_but(None)
        return None

    def _remove_all_but(self, kept: Path | None) -> None:
        for path in self._folder.iterdir():
            if path != kept:
                shutil.rmtree(path)


def _remove_unknown(known_step: int) -> None:
    """From the run's storage: checkpoints after the last that Ray Train knows, whole or not, which nobody would remove
    later.
    """
    storage = ray.train.get_context().get_storage()
    for found in storage.storage_filesystem.get_file_info(pafs.FileSelector(storage.experiment_fs_path)):
        if found.base_name.startswith(_PREFIX) and _step(Path(found.path)) > known_step:
            storage.storage_filesystem.delete_dir(found.path)


def _metrics(step: int, eval_loss: float | None) -> dict[str, Any]:
    return {"event": "checkpoint", "step": step, "eval_loss": eval_loss, SCORE: score(eval_loss)}


def _name(step: int) -> str:
    return f"{_PREFIX}{step:06d}"


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_state(checkpoint)
    except IntegrityError:
        return False
    return True
