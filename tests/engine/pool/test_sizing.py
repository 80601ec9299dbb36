"""A pool's bytes on a device that is made up."""

from __future__ import annotations

import logging

import pytest
import torch

from loray.engine.memory.limits import block_bytes, max_model_len
from loray.engine.pool import device_memory
from loray.engine.pool.device_memory import sized
from loray.errors import SpecError
from loray.spec import ServeSpec
from tests.engine.memory.test_device import BASE, CONFIG, GIB, SPEC

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "device_memory", lambda device: (80 * GIB, 64 * GIB, BASE))
    monkeypatch.setattr(device_memory, "workspace_bytes", dict)


def test_a_cpu_has_its_default() -> None:
    cpu = torch.device("cpu")
    assert sized(ServeSpec(), CONFIG, cpu).pool_bytes == 512 << 20
    assert sized(ServeSpec(pool_bytes=1 << 20), CONFIG, cpu).pool_bytes == 1 << 20


def test_a_gpu_gives_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        found = sized(SPEC, CONFIG, GPU).pool_bytes
    assert found is not None
    assert 54 * GIB < found < 56 * GIB
    assert f"partial sums 134.2 MB, staging 67.1 MB, cuBLAS 67.1 MB, recordings 1.1 GB, pool {found / 1e9:.1f} GB" in (
        caplog.text
    )
    assert max_model_len(SPEC, 8192, None) == 8192  # where only the replicas know their pool


def test_what_is_given_wins(caplog: pytest.LogCaptureFixture) -> None:
    given = SPEC.model_copy(update={"pool_bytes": 20 * GIB})
    with caplog.at_level(logging.INFO):
        assert sized(given, CONFIG, GPU) is given
    assert "pool 21.5 GB, which is given" in caplog.text
    assert "large steps" not in caplog.text
    sized(given.model_copy(update={"pool_bytes": 60 * GIB}), CONFIG, GPU)
    assert "large steps may find no memory" in caplog.text


def test_ranks_have_what_the_least_of_them_has() -> None:
    spec = SPEC.model_copy(update={"tensor_parallel_size": 2})
    asked: list[int] = []
    found = sized(spec, CONFIG, GPU, lambda num: asked.append(num) or 5 * GIB)  # type: ignore[func-returns-value]
    assert found.pool_bytes == 10 * GIB
    assert 54 * GIB < asked[0] < 56 * GIB


def test_a_full_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "device_memory", lambda device: (16 * GIB, GIB, BASE))
    with pytest.raises(SpecError, match="lower max_num_batched_tokens"):
        sized(SPEC, CONFIG, GPU)
    assert 2 * block_bytes(SPEC, CONFIG) == 4 << 20
