"""A worker: its threads and products, and how it ends when it or another one fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jobs.events import first_line
from jobs.workers import worker
from loray.bases.registry import get_base
from loray.errors import TrainingError
from loray.machine import Hardware
from loray.recipes.load import Recipe
from loray.settings import Settings
from tests.fixtures.machines import AVX2, H100
from tests.fixtures.planning import HARDWARE, recipe
from tests.fixtures.recipes import write


def config_of(recipe: Recipe, settings: Settings) -> worker.WorkerConfig:
    return worker.WorkerConfig(
        recipe=recipe.spec.model_dump(mode="json"),
        home=str(settings.home),
        base_fingerprint=get_base(settings.home, "tiny").fingerprint,
        log_level="WARNING",
        run="20260101",
        peak_tflops=None,
        events=None,
        data=None,
    )


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
    monkeypatch.setattr(worker, "EventSender", lambda sink: SimpleNamespace(send=lambda event: None))
    monkeypatch.setattr(worker, "hardware", lambda: replace(HARDWARE, gpus=(H100, H100)))
    monkeypatch.setattr(worker.ray.train, "get_context", lambda: context)
    recipe = write(tmp_path, num_workers=num_workers, use_gpu=True, dtype="bfloat16", batch={"rows": 8})
    with pytest.raises(TrainingError, match=f"out of memory: {first_line(error)[:40]}.*") as raised:
        worker.run(config_of(recipe, settings))
    assert "and more" not in str(raised.value)
    assert "; gradient_checkpointing: true would take 2." in str(raised.value)


def test_threads_are_those_that_the_nodes_environment_sets() -> None:
    for environ, expected in (
        (b"A=1\0OMP_NUM_THREADS=4\0B=2\0", 4),
        (b"OMP_NUM_THREADS=3,2\0", 3),
        (b"MY_OMP_NUM_THREADS=4\0", None),
        (b"OMP_NUM_THREADS=\0", None),
        (b"", None),
    ):
        assert worker.preset_threads(environ) == expected


def test_an_error_on_another_rank_ends_this_one_too(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = SimpleNamespace(rank=0, gather=lambda problem: [problem, "rank 1 has no such base"])
    monkeypatch.setattr(worker, "World", SimpleNamespace(current=lambda: world))
    monkeypatch.setattr(worker, "num_threads", lambda: 1)
    monkeypatch.setattr(worker, "_train", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(worker, "EventSender", lambda sink: SimpleNamespace(send=lambda event: None))
    config = config_of(write(tmp_path), settings)
    assert worker.run(config) == "rank 1 has no such base"
    config["base_fingerprint"] = "0" * 64
    assert "another model on this machine" in (worker.run(config) or "")


@pytest.mark.parametrize(
    ("hardware", "dtype", "warns"), [(AVX2, "bfloat16", True), (AVX2, "float32", False), (HARDWARE, "bfloat16", False)]
)
def test_bfloat16_on_a_cpu_without_it_is_warned_of_with_the_measured_factor(
    monkeypatch: pytest.MonkeyPatch, hardware: Hardware, dtype: str, warns: bool
) -> None:
    rates = {torch.bfloat16: 2e10, torch.float32: 1.2e11}
    monkeypatch.setattr(worker, "hardware", lambda: hardware)
    monkeypatch.setattr("loray.train.rates.product_flops", lambda device, dtype: rates[dtype])
    warning = worker._slow_products(recipe(dtype=dtype), torch.device("cpu"))
    assert (warning is not None) == warns
    assert not warns or "float32 are 6.0 times as fast here" in (warning or "")
