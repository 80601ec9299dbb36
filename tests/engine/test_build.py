"""What an engine chooses where its specification leaves it open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from loray.bases.registry import BaseModel
from loray_kernels import available
from loray_kernels.reference import ReferenceOps
from tests.fixtures.engines import make_engine
from tests.fixtures.planning import HARDWARE


@pytest.mark.parametrize("multiplies", [False, True])
def test_an_engine_chooses_bfloat16_where_kernels_read_half_of_the_bytes(
    multiplies: bool, tiny_base: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = replace(HARDWARE, multiplies_bfloat16=multiplies)
    monkeypatch.setattr("loray.engine.build.hardware", lambda: here)
    engine = make_engine(tiny_base(), dtype="auto")
    has_kernels = "cpu" in available()
    assert engine.spec.dtype == ("bfloat16" if multiplies or has_kernels else "float32")
    assert engine.pool.tensor.dtype is getattr(torch, engine.spec.dtype)
    engine.close()
    monkeypatch.setattr("loray.engine.build.backend", lambda name, device: ReferenceOps())
    engine = make_engine(tiny_base(), dtype="auto")
    assert engine.spec.dtype == ("bfloat16" if multiplies else "float32")
    engine.close()
