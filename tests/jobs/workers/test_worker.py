"""A worker that runs out of memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jobs.events.sink import _EventSink
from jobs.workers import worker
from loray.bases.registry import add_base, get_base
from loray.settings import Settings
from tests.planning.recipes import HARDWARE
from tests.test_machine import H100
from tests.test_recipe import write
from tests.tiny import write_checkpoint


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    add_base(str(write_checkpoint(tmp_path / "checkpoint", std=0.05)), home=tmp_path / "home", name="tiny")
    return Settings.from_env({"LORAY_HOME": str(tmp_path / "home")})


@pytest.mark.parametrize("num_workers", [1, 2])
def test_out_of_memory_ends_the_run_with_what_to_change(
    num_workers: int, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several workers the one that failed must raise, since the others wait: those that Ray starts next give up."""
    calls = []

    def fail(*_: object) -> None:
        calls.append("trained")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more")

    class Sink:
        """The actor, called here."""

        def __init__(self) -> None:
            sink = _EventSink("unused")
            self.reason = SimpleNamespace(remote=sink.reason)
            self.give_up = SimpleNamespace(remote=sink.give_up)

    world = SimpleNamespace(rank=0, size=num_workers, gather=lambda problem: [problem])
    context = SimpleNamespace(get_local_world_size=lambda: num_workers)
    monkeypatch.setattr(worker, "World", SimpleNamespace(current=lambda: world))
    monkeypatch.setattr(worker, "_num_threads", lambda: 1)
    monkeypatch.setattr(worker, "_train", fail)
    monkeypatch.setattr(worker, "hardware", lambda: replace(HARDWARE, gpus=(H100, H100)))
    monkeypatch.setattr(worker.ray, "get", lambda value: value)
    monkeypatch.setattr(worker.ray.train, "get_context", lambda: context)
    recipe = write(tmp_path, num_workers=num_workers, use_gpu=True, dtype="bfloat16", batch={"rows": 8})
    config = worker.WorkerConfig(
        recipe=recipe.spec.model_dump(mode="json"),
        home=str(settings.home),
        base_fingerprint=get_base(settings.home, "tiny").fingerprint,
        log_level="WARNING",
        run="20260101",
        peak_tflops=None,
        events=Sink(),  # type: ignore[typeddict-item]
        data=None,
    )
    if num_workers > 1:
        with pytest.raises(torch.OutOfMemoryError):
            worker.run(config)
    reason = worker.run(config) or ""
    assert calls == ["trained"]
    assert reason.startswith("out of memory: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "; gradient_checkpointing: true would take 2." in reason
