"""Uploads of checkpoints: during training, one at a time, in order, and without losing one that was written.

A thread stands in for Ray Train and uploads reports in order, as Ray's worker does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs as pafs
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.v2._internal.execution.storage import StorageContext

from jobs.workers import reporting as gauges_module
from jobs.workers.reporting import CheckpointUploads, Peak, RayReporter, TrainingGauges, Utilisation
from loray import spec
from loray.errors import TrainingError
from loray.spec import TrainSpec
from loray.telemetry import TRAINING_METRICS, figure_metrics
from loray.train.checkpoint import WRITTEN, RunState
from loray.train.mesh import World
from tests.fixtures.events import FIGURES, START, step
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
        spec, same = TrainSpec.model_validate(RECIPE | {"data": {"train": "x", "max_length": 8}}), "0" * 64
        known: dict[str, Any] = {"recipe": spec, "base_fingerprint": same, "data_fingerprint": same, "row_length": 8}
        state = RunState(**known, step=step, eval_loss=0.5 if step == 20 else None)
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
    with CheckpointUploads(folder, print) as uploads:
        for step in (1, 2, 3):
            uploads.add(step, None, None)
    ray.close()
    assert [m["step"] for m in ray.reported] == [1, 2, 3]
    assert ray.known is None


def test_checkpoints_of_a_lost_worker_are_uploaded_first(ray: Ray, folder: Path) -> None:
    """A checkpoint not yet uploaded, or not known to Ray, is still on the disk. Incomplete checkpoints are not used."""
    uploads = CheckpointUploads(folder, print).__enter__()
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

    with CheckpointUploads(folder, print) as successor:
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


@pytest.mark.parametrize("name", [f"{WRITTEN}000010", "step_000010"])
def test_what_was_written_and_not_reported_is_uploaded_and_a_damaged_one_skipped(
    ray: Ray, folder: Path, name: str
) -> None:
    ray.gate.set()
    with CheckpointUploads(folder, print) as uploads:
        write(folder, 10).rename(folder / name)
        write(folder, 20, whole=False).rename(folder / "step_000020")
        latest = uploads.latest(World())
        assert latest is not None
        assert ray.stored() == [Path(latest.path).name] == ["step_000010"]


@pytest.mark.parametrize(
    ("fails", "error"),
    [(True, None), (True, TrainingError("diverged")), (False, RuntimeError("the other rank is gone"))],
)
def test_checkpoints_that_are_not_uploaded_or_not_used_stay_for_the_next_worker(
    ray: Ray, folder: Path, fails: bool, error: Exception | None
) -> None:
    ray.error = fails
    ray.gate.set()
    with suppress(TrainingError, RuntimeError), CheckpointUploads(folder, print) as uploads:
        uploads.add(10, None, write(folder, 10))
        if error is not None:
            raise error
    assert [str(e) for e in ray.failed] == ["no such bucket"] * fails
    assert [p.name for p in folder.iterdir()] == ["step_000010"]


class Gauges:
    """Ray's, as a table."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: dict[str, float] = {}
        self.tags: dict[str, str] = {}

        def make(name: str, help: str, tag_keys: tuple[str, ...]) -> Any:
            def with_tags(tags: dict[str, str]) -> Any:
                assert tuple(tags) == tag_keys
                self.tags = tags
                return SimpleNamespace(set=lambda value: self.values.update({name: value}))

            return SimpleNamespace(set_default_tags=with_tags)

        monkeypatch.setattr(gauges_module, "Gauge", make)


def reporters(sent: list[dict[str, Any]], added: list[Any]) -> list[RayReporter]:
    events: Any = SimpleNamespace(send=sent.append)
    uploads: Any = SimpleNamespace(add=lambda *checkpoint: added.append(checkpoint))
    return [
        RayReporter(
            events,
            uploads,
            TrainingGauges("my-adapter", "20260101-000000", rank),
            Utilisation(2e9, Peak(4e12)) if rank == 0 else None,
            World(rank, 2),
            torch.device("cpu"),
            "this CPU has no bfloat16 products",
        )
        for rank in (0, 1)
    ]


def test_only_checkpoints_go_through_ray_and_only_rank_0_sends_events(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Gauges(monkeypatch)
    sent, added = list[dict[str, Any]](), list[Any]()
    event = step(1) | {"num_tokens": 64}
    for reporter, checkpoint in zip(reporters(sent, added), (tmp_path, None), strict=True):
        reporter.report(START, None)
        reporter.report(event, None)
        reporter.report({"event": "checkpoint", "step": 1, "eval_loss": None}, checkpoint)
    assert added == [(1, None, tmp_path), (1, None, None)]
    start, step_event = sent
    assert start == START | {"flops_per_token": 2e9, "peak_flops": 4e12, "peak_source": "setting"}
    assert step_event["mfu"] == pytest.approx(1234.5 * 2e9 / (2 * 4e12))
    assert step_event["peak_flops"] == 4e12
    assert 1 << 20 < step_event["memory_bytes"] < 1 << 40


def test_every_gauge_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Gauges(monkeypatch)
    sent = list[dict[str, Any]]()
    first, second = reporters(sent, [])
    first.report(step(7, float("nan")) | {"num_tokens": 64, "lr": 0.25}, None)
    assert "loray_train_loss" not in table.values  # NaN is not exposed
    first.report(step(8) | {"num_tokens": 128}, None)
    first.report({"event": "eval", "step": 0, "subject": "base", "eval_loss": 9.0}, None)
    first.report({"event": "eval", "step": 8, "subject": "adapter", "eval_loss": 1.5}, None)
    assert not [name for name in table.values if "rewards" in name]  # without pairs
    figures = dict.fromkeys(spec.FIGURES, 0.5) | FIGURES
    first.report(step(8) | figures | {"num_tokens": 128}, None)
    first.report({"event": "eval", "step": 8, "subject": "adapter", "eval_loss": 1.5} | figures, None)
    first.gauges.set(checkpoint_seconds=0.5)
    known = [*TRAINING_METRICS.values(), *figure_metrics(spec.FIGURES).values()]
    assert sorted(table.values) == sorted(metric.name for metric in known)
    assert (
        table.values["loray_train_rewards_accuracies"] == table.values["loray_train_eval_rewards_accuracies"] == 0.875
    )
    assert (table.values["loray_train_step"], table.values["loray_train_eval_loss"]) == (8, 1.5)
    table.values.clear()
    second.report(step(9) | {"num_tokens": 128}, None)
    assert list(table.values) == ["loray_train_memory_bytes"]
    assert table.tags == {"name": "my-adapter", "run": "20260101-000000", "rank": "1"}


class Machine:
    """A clock, and samples of the peak: each takes `seconds`, and is of the next rate."""

    def __init__(self, rates: Iterable[float], seconds: float = 1.0) -> None:
        self.now, self.seconds, self.taken = 0.0, seconds, 0
        self._rates = iter(rates)

    def clock(self) -> float:
        return self.now

    def sample(self) -> float:
        self.now, self.taken = self.now + self.seconds, self.taken + 1
        return next(self._rates)

    def peak(self, *, again: bool = True) -> Peak:
        return Peak(self.sample, self.sample if again else None, self.clock)


def test_a_peak_that_was_measured_on_a_busy_machine_is_measured_again() -> None:
    """The machine does 100 FLOP/s, and 30 while something else runs."""
    machine = Machine([30.0, 100.0])
    use = Utilisation(flops_per_token=2.0, peak=machine.peak())
    assert use.mfu(tokens_per_s=20.0, num_workers=2) == pytest.approx(20 / 30)
    assert use.mfu(tokens_per_s=60.0, num_workers=2) == 1.0  # too soon after the first sample
    machine.now += 20
    assert use.mfu(tokens_per_s=60.0, num_workers=2) == pytest.approx(0.6)  # 60 is more than 30
    assert use.mfu(tokens_per_s=50.0, num_workers=2) == pytest.approx(0.5)
    assert machine.taken == 2


@pytest.mark.parametrize("again", [True, False])
@given(
    rates=st.lists(st.floats(1.0, 1e15), min_size=60, max_size=60),
    steps=st.lists(st.tuples(st.floats(0.1, 1e3), st.floats(1.0, 1e15)), max_size=50),
)
def test_a_share_is_never_more_than_one(again: bool, rates: list[float], steps: list[tuple[float, float]]) -> None:
    machine = Machine(rates)
    peak, before = machine.peak(again=again), 0.0
    for seconds, attained in steps:
        machine.now += seconds
        assert 0 < Utilisation(1.0, peak).mfu(attained, 1) <= 1
        assert peak.flops >= before
        before = peak.flops


def test_samples_take_little_of_a_run() -> None:
    machine = Machine([100.0] * 99, seconds=2.0)
    peak, began = machine.peak(), machine.now
    for _ in range(4000):
        machine.now += 1.0
        peak.compare(40.0)
    spent = (machine.taken - 1) * machine.seconds
    assert 0.004 < spent / (machine.now - began) <= 0.005


def test_a_given_peak_stays() -> None:
    assert Utilisation(1.0, Peak(10.0)).mfu(20.0, 1) == 2.0  # which shows that the setting is wrong
