"""Events of a run are found by its job and read in bounded parts."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from jobs.runs import history
from jobs.runs.history import RunEvents
from loray.errors import StoreError
from loray.settings import Settings

BEGAN = datetime(2026, 1, 2, 12, tzinfo=UTC)


def write_run(settings: Settings, place: str, job_id: str, num_steps: int) -> None:
    folder = settings.home / "runs" / place
    folder.mkdir(parents=True)
    (folder / "job_id").write_text(job_id)
    lines = [json.dumps({"event": "step", "step": step, "loss": 1.0 / step}) for step in range(1, num_steps + 1)]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")


def read_events(settings: Settings, name: str, job_id: str) -> list[str]:
    return RunEvents(settings, name, job_id, BEGAN).read().lines


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env({"LORAY_HOME": str(tmp_path)})


def test_a_job_has_the_run_that_it_began(settings: Settings) -> None:
    write_run(settings, "tone/20260101-120000-000000", "train_1", 1)
    write_run(settings, "tone/20260102-120001-000000", "train_1", 2)
    write_run(settings, "tone/20260102-120002-000000", "train_2", 3)
    write_run(settings, "_acme/tone/20260102-120003-000000", "train_3", 4)
    assert len(read_events(settings, "tone", "train_1")) == 2
    assert len(read_events(settings, "tone", "train_2")) == 3
    assert len(read_events(settings, "acme/tone", "train_3")) == 4
    for name, job_id in (("tone", "train_3"), ("nothing", "train_1")):
        assert read_events(settings, name, job_id) == []


def test_the_longer_file_of_a_run_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that went on elsewhere left a part of its events here."""
    monkeypatch.setattr(history, "open_filesystem", lambda _: (pafs.LocalFileSystem(), str(tmp_path / "bucket")))
    env = {"LORAY_STORE": "s3://bucket", "LORAY_HOME": str(tmp_path / "home")}
    settings, bucket = Settings.from_env(env), Settings.from_env({"LORAY_HOME": str(tmp_path / "bucket")})
    run = "tone/20260102-120001-000000"
    write_run(bucket, run, "train_1", 3)
    assert len(read_events(settings, "tone", "train_1")) == 3
    write_run(settings, run, "train_1", 2)
    assert len(read_events(settings, "tone", "train_1")) == 3
    with (settings.home / "runs" / run / "events.jsonl").open("a") as file:
        file.write("{}\n" * 100)
    assert len(read_events(settings, "tone", "train_1")) == 102


def test_a_long_history_is_read_in_parts(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(settings, "tone/20260102-120001-000000", "train_1", 5000)
    monkeypatch.setattr(history, "MAX_BYTES", 32_000)
    lines = read_events(settings, "tone", "train_1")
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (1, 5000)
    assert sum(map(len, lines)) < 32_000
    assert len([step for step in steps if 2000 < step < 3000]) > 50


def test_a_look_reads_only_what_was_appended(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(settings, "tone/20260102-120001-000000", "train_1", 1000)
    file = settings.home / "runs/tone/20260102-120001-000000/events.jsonl"
    events = RunEvents(settings, "tone", "train_1", BEGAN)
    assert [len(events.read().lines), events.read()] == [1000, ([], False)]
    read: list[int] = []
    take = history._whole_lines

    def counted(opened: object, at: int, num_bytes: int) -> bytes:
        read.append(num_bytes)
        return take(opened, at, num_bytes)

    monkeypatch.setattr(history, "_whole_lines", counted)
    with file.open("a") as appended:
        appended.write('{"event": 1}\n{"ev')
        appended.flush()
        assert events.read() == (['{"event": 1}'], False)
        appended.write('ent": 2}\n')
    assert events.read() == (['{"event": 2}'], False)
    assert sum(read) < 50
    file.write_text('{"event": 3}\n')  # a driver that began the run anew
    assert events.read() == (['{"event": 3}'], True)
    file.write_text('{"event": 4}\n{"event": 5}\n')
    assert events.read() == (['{"event": 4}', '{"event": 5}'], True)


def test_a_read_that_fails_is_made_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(settings, "tone/20260102-120001-000000", "train_1", 3)
    file = settings.home / "runs/tone/20260102-120001-000000/events.jsonl"
    events, take, failures = RunEvents(settings, "tone", "train_1", BEGAN), history._whole_lines, [1, 1]

    def once(opened: object, at: int, num_bytes: int) -> bytes:
        if failures:
            failures.pop()
            raise OSError("the store does not answer")
        return take(opened, at, num_bytes)

    monkeypatch.setattr(history, "_whole_lines", once)
    for _ in range(2):
        with pytest.raises(StoreError, match="does not answer"):
            events.read()
    assert (len(events.read().lines), events.read()) == (3, ([], False))
    file.write_text('{"event": 3}\n')  # a driver that began the run anew
    failures.append(1)
    with pytest.raises(StoreError):
        events.read()
    assert events.read() == (['{"event": 3}'], True)


def test_the_run_is_looked_for_among_new_folders_alone(settings: Settings) -> None:
    events = RunEvents(settings, "tone", "train_1", BEGAN)
    assert events.read() == ([], False)
    write_run(settings, "tone/20260102-120001-000000", "train_2", 1)
    assert events.read().lines == []
    write_run(settings, "tone/20260102-120002-000000", "train_1", 2)
    assert len(events.read().lines) == 2
