"""The engine on the cuda backend without a GPU, against transformers + PEFT: a batch of every kind of adapter.

Collected by name only, as `interpreted` is.
"""

from __future__ import annotations

import pytest

from loray.engine import build
from loray_kernels import Ops
from tests.engine.model.test_parity import case, test_mixed_batch_gives_the_logits_of_peft  # noqa: F401
from tests.kernels.cuda.interpreted import dots, ops  # noqa: F401


@pytest.fixture(autouse=True)
def on_cuda_ops(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(build, "backend", lambda name, device: ops)
