"""Trackers: what MLflow and Weights & Biases hold of a run, without a server, and what is refused or left out."""

from __future__ import annotations

import importlib.util
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from jobs import trackers
from jobs.driver.prepare import prepare
from jobs.trackers import TrackedRun, Trackers, check_installed, tensorboard, tracked
from loray.errors import SpecError, TrainingError
from loray.settings import Settings
from loray.spec import TrainSpec
from tests.fixtures.events import FIGURES, START, step
from tests.fixtures.recipes import write

EVENTS: list[Any] = [
    {"event": "start", "step": 0, "num_steps": 2, "pid": 1},
    {"event": "eval", "step": 0, "subject": "base", "eval_loss": 3.0},
    {"event": "step", "step": 1, "loss": 2.5, "lr": 0.01, "grad_norm": None, "tokens_per_s": 9.0, "skipped_steps": 0},
    {"event": "step", "step": 2, "loss": 2.0, "lr": 0.0, "grad_norm": 1.5, "tokens_per_s": 8.0, "skipped_steps": 0},
    {"event": "eval", "step": 2, "subject": "adapter", "eval_loss": 2.25},
    {"event": "eval", "step": 2, "subject": "adapter", "eval_loss": None},
]
PUBLISHED: Any = {"event": "published", "label": "arithmetic@3", "digest": "0" * 64}


def recipe(folder: Path, *names: str) -> TrainSpec:
    return write(folder, tracking=list(names)).spec


def run_of(spec: TrainSpec) -> TrackedRun:
    return TrackedRun("acme/arithmetic", "arithmetic/20261126-1", spec, sweep="arithmetic/20261125")


def test_mlflow_has_the_recipe_the_metrics_and_what_was_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run, seen = run_of(recipe(tmp_path, "mlflow")), []

    def interrupted() -> None:
        with tracked(run, seen.append) as first:
            for event in EVENTS[:3]:
                first.emit(event)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    client = MlflowClient()
    (experiment,) = (e.experiment_id for e in client.search_experiments() if e.name == "loray")
    assert [found.info.status for found in client.search_runs([experiment])] == ["FAILED"]
    with tracked(run) as resumed:
        for event in (*EVENTS[3:], PUBLISHED):
            resumed.tell(event)
    assert seen == EVENTS[:3]

    (found,) = client.search_runs([experiment])
    assert found.info.status == "FINISHED"
    assert found.data.params["adapter.rank"] == "4"
    assert found.data.params["optimizer.learning_rate"] == "0.01"
    assert found.data.params["tracking"] == "['mlflow']"
    steps = [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "train/loss")]
    assert steps == [(1, 2.5), (2, 2.0)]
    assert found.data.metrics["eval/loss_adapter"] == 2.25
    tags = {key: value for key, value in found.data.tags.items() if key.startswith("loray.")}
    assert tags == {
        "loray.run": "arithmetic/20261126-1",
        "loray.adapter": "acme/arithmetic",
        "loray.base": "tiny",
        "loray.sweep": "arithmetic/20261125",
        "loray.version": "arithmetic@3",
        "loray.digest": "0" * 64,
    }


def test_wandb_has_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with tracked(run_of(recipe(tmp_path, "wandb"))) as opened:
        for event in (*EVENTS, PUBLISHED):
            opened.tell(event)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-arithmetic-20261126-1.wandb")
    records = finished(file)
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.project, run.run_group) == ("loray", "arithmetic/20261125")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["adapter.rank"], config["loray.adapter"]) == ("4", "acme/arithmetic")
    history = [values(record.history.item) for record in records if record.HasField("history")]
    assert [(row["step"], row["train/loss"]) for row in history if "train/loss" in row] == [(1, 2.5), (2, 2.0)]
    summaries = [values(record.summary.update) for record in records if record.HasField("summary")]
    assert any(summary.get("loray.version") == "arithmetic@3" for summary in summaries)


def finished(file: Path) -> list[Any]:
    """W&B's own process writes the file, and may still do so when the run has been finished."""
    deadline = time.monotonic() + 60
    while True:
        records = list(wandb_records(file))
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < deadline, records
        time.sleep(0.05)


def values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, whose chunks have 7 bytes before them."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):
            return
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last chunk
            yield Record.FromString(whole)
            whole = b""


def test_a_missing_library_is_refused_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else importlib.util.find_spec(name))
    check_installed(("tensorboard", "mlflow"))
    missing = write(tmp_path, base="nowhere", tracking=["wandb"])
    with pytest.raises(SpecError, match=r"pip install 'loray\[wandb\]'"):
        prepare(missing, Settings.from_env({"LORAY_HOME": str(tmp_path)}))
    with pytest.raises(SpecError, match="tracking"):
        write(tmp_path, tracking=["paper"])


def test_what_cannot_be_reached_is_an_error_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "carrier-pigeon://roof")
    with (
        pytest.raises(TrainingError, match="tracking: mlflow cannot be reached"),
        tracked(run_of(recipe(tmp_path, "mlflow"))),
    ):
        pass


def test_a_tracker_that_fails_later_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        calls = 0

        def log(self, values: Any, step: int) -> None:
            self.calls += 1
            raise OSError("disk full")

        def tag(self, tags: Any) -> None:
            raise AssertionError

        def end(self, *, succeeded: bool) -> None:
            raise AssertionError

    broken, seen = Broken(), []
    opened = Trackers({"mlflow": broken}, seen.append)
    for event in (*EVENTS, PUBLISHED):
        opened.emit(event)
    opened.end(succeeded=True)
    assert broken.calls == 1
    assert seen == [*EVENTS, PUBLISHED]


def test_a_board_shows_the_run_without_steps_that_a_restart_repeats(tmp_path: Path) -> None:
    with tensorboard(tmp_path) as write_event:
        write_event(START | {"pid": 1})
        for number in (1, 2, 3):
            write_event(step(number) | {"memory_bytes": 5})
        write_event({"event": "worker_lost", "message": "rank 1"})
        write_event(START | {"step": 2, "pid": 2})
        write_event(step(3) | {"memory_bytes": 6, "loss": None})
        write_event({"event": "eval", "step": 3, "subject": "adapter", "eval_loss": 1.5} | FIGURES)
    first, second = (read(path) for path in sorted(tmp_path.iterdir(), key=lambda p: p.suffix))
    assert [e.step for e in first if e.HasField("session_log")] == [1]
    assert [e.step for e in second if e.HasField("session_log")] == [3]
    assert scalars(first, "train/loss") == {1: 2.0, 2: 2.0, 3: 2.0}
    assert scalars(first, "throughput/mfu") == {n: pytest.approx(0.312) for n in (1, 2, 3)}
    assert scalars(second, "train/loss") == {}
    assert scalars(second, "memory/peak_bytes") == {3: 6.0}
    assert scalars(second, "eval/loss_adapter") == {3: 1.5}
    assert scalars(second, "eval/rewards/accuracies_adapter") == {3: 0.875}


def read(path: Path) -> list[Event]:
    """Reads records of: length, its checksum, an event, its checksum."""
    data, events = path.read_bytes(), []
    while data:
        (size,) = struct.unpack_from("<Q", data)
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return events


def scalars(events: list[Event], tag: str) -> dict[int, float]:
    return {e.step: v.simple_value for e in events for v in e.summary.value if v.tag == tag}
