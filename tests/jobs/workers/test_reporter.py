"""A worker's reports: events with MFU and memory, gauges, scalars for TensorBoard."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

from jobs.trackers import TensorBoardWriter
from jobs.workers import reporting as gauges_module
from jobs.workers.reporting import GivenPeak, RayReporter, TrainingGauges, Utilisation
from loray.telemetry import TRAINING_METRICS
from loray.train.mesh import World
from tests.jobs.test_events import FIGURES, START, step


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
            Utilisation(2e9, GivenPeak(4e12)) if rank == 0 else None,
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
    first.report(step(8) | FIGURES | {"num_tokens": 128}, None)
    first.report({"event": "eval", "step": 8, "subject": "adapter", "eval_loss": 1.5} | FIGURES, None)
    first._gauges.set(checkpoint_seconds=0.5)
    assert sorted(table.values) == sorted(m.name for m in TRAINING_METRICS.values())
    assert (
        table.values["loray_train_rewards_accuracies"] == table.values["loray_train_eval_rewards_accuracies"] == 0.875
    )
    assert (table.values["loray_train_step"], table.values["loray_train_eval_loss"]) == (8, 1.5)
    table.values.clear()
    second.report(step(9) | {"num_tokens": 128}, None)
    assert list(table.values) == ["loray_train_memory_bytes"]
    assert table.tags == {"name": "my-adapter", "run": "20260101-000000", "rank": "1"}


def test_a_board_shows_the_run_without_steps_that_a_restart_repeats(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as board:
        board.write(START | {"pid": 1})
        for number in (1, 2, 3):
            board.write(step(number) | {"memory_bytes": 5})
        board.write({"event": "worker_lost", "message": "rank 1"})
        board.write(START | {"step": 2, "pid": 2})
        board.write(step(3) | {"memory_bytes": 6, "loss": None})
        board.write({"event": "eval", "step": 3, "subject": "adapter", "eval_loss": 1.5} | FIGURES)
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
