"""A trainer as its actor holds it, without Ray, on a tiny base; and one that goes on after it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.trainer.actor import Trainer
from loray.bases.registry import BaseModel, add_base
from loray.spec import LoraSpec, VeraSpec
from loray.spec.datums import Datum

SPECS: dict[str, dict[str, Any]] = {
    "one": LoraSpec(rank=4).model_dump(mode="json"),
    "two": LoraSpec(rank=8, target_modules=("q_proj", "v_proj")).model_dump(mode="json"),
    "vera": VeraSpec(rank=8).model_dump(mode="json"),
}


def datum(seed: int, length: int = 9) -> Datum:
    ids = np.random.default_rng(seed).integers(0, 256, length + 1)
    return Datum(ids[:-1], ids[1:])


@pytest.fixture
def home(tiny_base: Callable[..., BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LORAY_HOME with the base `tiny`."""
    monkeypatch.setenv("LORAY_HOME", str(tmp_path / "home"))
    for name in ("LORAY_STORE", "LORAY_CATALOG"):
        monkeypatch.delenv(name, raising=False)
    add_base(str(tiny_base().path), home=tmp_path / "home", name="tiny")
    return tmp_path / "home"


@asynccontextmanager
async def running() -> AsyncIterator[Trainer]:
    """A trainer, which ends as a killed process does: with what is on disk."""
    trainer = Trainer("tiny", "float32", "loray-trainer-tiny")
    torch.set_num_threads(1)  # by several, equal passes need not have equal bits
    try:
        yield trainer
    finally:
        if trainer._task is not None:
            trainer._task.cancel()
        trainer._thread.shutdown(cancel_futures=True)
        trainer._held.close()
