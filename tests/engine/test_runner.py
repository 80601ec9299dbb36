"""What the runner waits for on a device."""

from __future__ import annotations

import pytest
import torch

from loray.bases.registry import BaseModel
from tests.fixtures.engines import make_engine, request, run


def test_a_chunk_without_a_token_waits_for_its_step_and_not_for_the_device(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters are copied on other streams meanwhile."""
    events: list[str] = []

    class Event:
        def record(self) -> None:
            events.append("queued")

        def synchronize(self) -> None:
            events.append("waited")

    def refuse() -> None:
        raise AssertionError("the whole device is waited for")

    engine = make_engine(base, max_num_seqs=4, max_num_batched_tokens=16)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    engine._runner._on_gpu = True
    run(engine, [request("r", range(3, 43), max_tokens=2)])  # in chunks of 16, 16 and 8 tokens
    assert events == ["queued", "waited"] * 2
