"""The engine on the cuda backend without a GPU, against transformers + PEFT: a batch of every kind of adapter.

Collected by name only, as `interpreted` is.
"""

from __future__ import annotations

import pytest

from loray.engine import build
from loray_kernels import Ops
from tests.fixtures.parity import Case, case, check_mixed_batch  # noqa: F401
from tests.kernels.cuda.interpreted import dots, ops  # noqa: F401


@pytest.fixture(autouse=True)
def on_cuda_ops(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(build, "backend", lambda name, device: ops)


@pytest.mark.parametrize("budget", [512, 24], ids=["whole prompts", "chunked"])
def test_mixed_batch_gives_the_logits_of_peft(case: Case, budget: int) -> None:  # noqa: F811
    check_mixed_batch(case, budget)
