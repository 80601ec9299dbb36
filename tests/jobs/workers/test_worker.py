"""A worker that runs out of memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jobs.events import first_line
from jobs.workers import worker
from loray.bases.registry import add_base, get_base
from loray.errors import TrainingError
from loray.settings import Settings
from tests.fixtures.tiny import write_checkpoint
from tests.planning.recipes import HARDWARE
from tests.test_machine import H100
from tests.test_recipe import write


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    add_base(str(write_checkpoint(tmp_path / "checkpoint", std=0.05)), home=tmp_path / "home", name="tiny")
    return Settings.from_env({"LORAY_HOME": str(tmp_path / "home")})


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["torch", "cuBLAS"],
)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_out_of_memory_ends_the_run_with_what_to_change(
    num_workers: int, error: RuntimeError, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises, since other workers wait for it."""

    def fail(*_: object) -> None:
        raise error

    world = SimpleNamespace(rank=0, size=num_workers, gather=lambda problem: [problem])
    context = SimpleNamespace(get_local_world_size=lambda: num_workers)
    monkeypatch.setattr(worker, "World", SimpleNamespace(current=lambda: world))
    monkeypatch.setattr(worker, "num_threads", lambda: 1)
    monkeypatch.setattr(worker, "_train", fail)
    monkeypatch.setattr(worker, "hardware", lambda: replace(HARDWARE, gpus=(H100, H100)))
    monkeypatch.setattr(worker.ray.train, "get_context", lambda: context)
    recipe = write(tmp_path, num_workers=num_workers, use_gpu=True, dtype="bfloat16", batch={"rows": 8})
    config = worker.WorkerConfig(
        recipe=recipe.spec.model_dump(mode="json"),
        home=str(settings.home),
        base_fingerprint=get_base(settings.home, "tiny").fingerprint,
        log_level="WARNING",
        run="20260101",
        peak_tflops=None,
        events=None,
        data=None,
    )
    with pytest.raises(TrainingError, match=f"out of memory: {first_line(error)[:40]}.*") as raised:
        worker.run(config)
    assert "and more" not in str(raised.value)
    assert "; gradient_checkpointing: true would take 2." in str(raised.value)
