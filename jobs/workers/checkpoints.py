"""Uploads checkpoints from rank 0's disk to the run's storage while training continues.

Rank 0 writes a checkpoint to its disk, and Ray Train uploads it from a thread: one at a time, in order; the end of
training waits for the last. A checkpoint stays on the disk until the next one is written. If rank 0 is lost before an
upload has begun or finished, the worker that replaces it on the same machine finds the checkpoint there and uploads it
first.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event

import ray.train
from pyarrow import fs as pafs
from ray.train import Checkpoint, CheckpointUploadMode

from jobs.runs.saved import PREFIX, metrics_of, name_of, step_of
from loray.errors import IntegrityError, LorayError
from loray.telemetry import get_logger
from loray.train.checkpoint import read_state
from loray.train.mesh import World
from loray.train.saving import WRITTEN

log = get_logger(__name__)


class CheckpointUploads:
    """The uploads of one worker. The end of its `with` block waits for the last upload.

    `folder` contains rank 0's checkpoints and nothing else; other ranks write none. The uploading thread calls
    `arrived(seconds)` with the time from writing a checkpoint to the end of its upload.
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
        """Removes the folder, except after an error that makes Ray Train start another worker, which needs it."""
        if error is None or isinstance(error, LorayError):
            self._idle.wait()
            if not self._failed:
                shutil.rmtree(self._folder)

    def latest(self, world: World) -> Checkpoint | None:
        """The checkpoint to resume from: the last that Ray Train knows, or a later one that a lost worker left here.

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
        """The last complete checkpoint of a step after `known_step`. Everything else in the folder is removed."""
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
