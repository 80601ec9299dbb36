"""Engines whose steps a test makes and looks at."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from loray.engine import build
from loray.engine.engine import Engine
from loray.engine.request import Chunk
from loray.spec import GenerateRequest
from loray_kernels.reference import ReferenceOps
from tests.fixtures.engines import submit


def served(engine: Engine, requests: Sequence[GenerateRequest], joins: int) -> dict[str, list[int]]:
    """Tokens by request. They come `joins` at a time, each time when a few steps have been made, whatever time adapters
    take to load.
    """
    out: dict[str, list[int]] = {r.request_id: [] for r in requests}
    waiting, loaded = list(requests), threading.Event()
    engine.wake = loaded.set
    while waiting or engine.has_work:
        submit(engine, waiting[:joins])
        del waiting[:joins]
        for _ in range(4 if waiting else 1):
            loaded.clear()
            tokens = engine.step()
            while engine.idle and engine.has_work:
                assert loaded.wait(30)
                loaded.clear()
                tokens += engine.step()
            for token in tokens:
                assert token.error is None
                assert token.token_id is not None
                out[token.request_id].append(token.token_id)
            engine.check_integrity()
    return out


def decode_steps_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Batches of steps from now on in which all requests decode."""
    batch, found = engine._model.batch, []

    def batched(chunks: list[Chunk], *arguments: Any) -> Any:
        made = batch(chunks, *arguments)
        if made is not None and all(c.num_tokens == 1 and c.request.output_ids and c.is_last for c in chunks):
            found.append(made)
        return made

    monkeypatch.setattr(engine._model, "batch", batched)
    return found


def use_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that are built from now on compute with torch's ops."""
    ops = ReferenceOps()
    monkeypatch.setattr(build, "backend", lambda name, device: ops)
