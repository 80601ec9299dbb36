"""Uploads of checkpoints: during training, one at a time, in order, and without losing one that was written.

A thread stands in for Ray Train and uploads reports in order, as Ray's worker does.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow import fs as pafs
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.v2._internal.execution.storage import StorageContext

from jobs.workers.reporting import CheckpointUploads
from loray.errors import TrainingError
from loray.spec import TrainSpec
from loray.train.checkpoint import WRITTEN, RunState
from loray.train.mesh import World
from tests.fixtures.recipes import RECIPE


class Ray:
    """Ray Train's part of one worker. Uploads wait for `gate`, or fail if `error` is set."""

    def __init__(self, folder: Path) -> None:
        self.storage = StorageContext(str(folder), "run", storage_filesystem=pafs.LocalFileSystem())
        self.gate, self.error = Event(), False
        self.known: Checkpoint | None = None
        self.reported: list[dict[str, Any]] = []
        self.failed: list[BaseException] = []
        self._thread = ThreadPoolExecutor(1)
        self.persist, self.storage.persist_current_checkpoint = self.storage.persist_current_checkpoint, self._persist

    def _persist(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        self.gate.wait(30)
        if self.error:
            raise OSError("no such bucket")
        return self.persist(checkpoint, name)

    def report(
        self,
        metrics: dict[str, Any],
        checkpoint: Checkpoint | None,
        checkpoint_dir_name: str,
        checkpoint_upload_mode: CheckpointUploadMode = CheckpointUploadMode.SYNC,
        checkpoint_upload_fn: Any = None,
        delete_local_checkpoint_after_upload: bool | None = None,
    ) -> None:
        assert not delete_local_checkpoint_after_upload
        upload = checkpoint_upload_fn or self._persist

        def run() -> None:
            try:
                if checkpoint is not None:
                    self.known = upload(checkpoint, checkpoint_dir_name)
                self.reported.append(metrics)
            except OSError as e:
                self.failed.append(e)

        done = self._thread.submit(run)
        if checkpoint_upload_mode == CheckpointUploadMode.SYNC:
            done.result()

    def stored(self) -> list[str]:
        return sorted(p.name for p in Path(self.storage.experiment_fs_path).glob("step_*"))

    def close(self) -> None:
        self.gate.set()
        self._thread.shutdown()


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ray]:
    worker = Ray(tmp_path / "storage")
    monkeypatch.setattr("ray.train.report", worker.report)
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: worker.known)
    monkeypatch.setattr("ray.train.get_context", lambda: SimpleNamespace(get_storage=lambda: worker.storage))
    yield worker
    worker.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "home" / "checkpoints"


def write(folder: Path, step: int, *, whole: bool = True) -> Path:
    written = folder / f"checkpoint-{step}"
    written.mkdir()
    if whole:
        data = {"train": "x", "max_length": 8}
        state = RunState(
            recipe=TrainSpec.model_validate(RECIPE | {"data": data}),
            base_fingerprint="0" * 64,
            data_fingerprint="0" * 64,
            row_length=8,
            step=step,
            eval_loss=0.5 if step == 20 else None,
        )
        (written / RunState.FILE).write_text(state.model_dump_json())
    return written


def test_training_continues_while_one_checkpoint_is_uploaded(ray: Ray, folder: Path) -> None:
    seconds: list[float] = []
    with CheckpointUploads(folder, seconds.append) as uploads:
        uploads.add(10, 0.5, write(folder, 10))
        assert ray.stored() == []
        second = ThreadPoolExecutor(1).submit(uploads.add, 20, None, write(folder, 20))
        assert not second.done()
        assert [p.name for p in folder.glob("step_*")] == ["step_000010"]  # the second one waits
        ray.gate.set()
        second.result(30)
        assert (folder / "step_000020").is_dir()
        assert not (folder / "step_000010").exists()
    assert ray.stored() == ["step_000010", "step_000020"]
    assert [m["step"] for m in ray.reported] == [10, 20]
    assert len(seconds) == 2
    assert not folder.exists()


def test_the_other_ranks_report_as_often_and_upload_nothing(ray: Ray, folder: Path) -> None:
    ray.gate.set()
    with CheckpointUploads(folder, lambda seconds: None) as uploads:
        for step in (1, 2, 3):
            uploads.add(step, None, None)
    ray.close()
    assert [m["step"] for m in ray.reported] == [1, 2, 3]
    assert ray.known is None


def test_checkpoints_of_a_lost_worker_are_uploaded_first(ray: Ray, folder: Path) -> None:
    """A checkpoint not yet uploaded, or not known to Ray, is still on the disk. Incomplete checkpoints are not used."""
    uploads = CheckpointUploads(folder, lambda seconds: None).__enter__()
    ray.gate.set()
    uploads.add(10, None, write(folder, 10))
    uploads._idle.wait(30)
    ray.gate.clear()
    uploads.add(20, 0.5, write(folder, 20))
    write(folder, 30)
    lost, ray.reported = ray, []  # the worker dies during an upload, and while it writes the next checkpoint
    ray.gate.set()
    lost.close()
    ray._thread = ThreadPoolExecutor(1)
    ray.known = Checkpoint(ray.storage.build_checkpoint_path_from_name("step_000010"), ray.storage.storage_filesystem)
    ray.reported = []
    assert ray.stored() == ["step_000010", "step_000020"]
    Path(ray.storage.build_checkpoint_path_from_name("step_000015")).mkdir()  # of another worker that was lost earlier

    with CheckpointUploads(folder, lambda seconds: None) as successor:
        latest = successor.latest(World())
        assert latest is not None
        assert Path(latest.path, RunState.FILE).is_file()
        assert Path(latest.path).name == "step_000020"
        assert [(m["step"], m["eval_loss"], m["score"]) for m in ray.reported] == [(20, 0.5, 0.5)]
        assert [p.name for p in folder.iterdir()] == ["step_000020"]
        assert ray.stored() == ["step_000010", "step_000020"]
        again = successor.latest(World())
        assert again is not None
        assert len(ray.reported) == 1
        assert list(folder.iterdir()) == []


def test_a_checkpoint_that_was_written_and_not_reported_is_uploaded(ray: Ray, folder: Path) -> None:
    ray.gate.set()
    with CheckpointUploads(folder, lambda seconds: None) as uploads:
        write(folder, 10).rename(folder / f"{WRITTEN}000010")
        latest = uploads.latest(World())
        assert latest is not None
        assert ray.stored() == [Path(latest.path).name] == ["step_000010"]


def test_a_damaged_checkpoint_is_skipped(ray: Ray, folder: Path) -> None:
    with CheckpointUploads(folder, lambda seconds: None) as uploads:
        write(folder, 10).rename(folder / "step_000010")
        write(folder, 20, whole=False).rename(folder / "step_000020")
        ray.gate.set()
        latest = uploads.latest(World())
        assert latest is not None
        assert Path(latest.path).name == "step_000010"


@pytest.mark.parametrize("error", [None, TrainingError("diverged")])
def test_an_upload_that_fails_leaves_its_checkpoint_to_the_next_worker(
    ray: Ray, folder: Path, error: TrainingError | None
) -> None:
    ray.error = True
    ray.gate.set()
    with suppress(TrainingError), CheckpointUploads(folder, lambda seconds: None) as uploads:
        uploads.add(10, None, write(folder, 10))
        if error is not None:
            raise error
    assert [str(e) for e in ray.failed] == ["no such bucket"]
    assert [p.name for p in folder.iterdir()] == ["step_000010"]


def test_checkpoints_stay_after_an_error_that_restarts_workers(ray: Ray, folder: Path) -> None:
    ray.gate.set()
    with suppress(RuntimeError), CheckpointUploads(folder, lambda seconds: None) as uploads:
        uploads.add(10, None, write(folder, 10))
        raise RuntimeError("the other rank is gone")
    assert [p.name for p in folder.iterdir()] == ["step_000010"]
