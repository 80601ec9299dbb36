"""Captured decode steps of an engine where blocks, captures or memory are not what the step before left."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from loray.bases.registry import BaseModel
from loray_kernels import DecodeStep, Parts
from loray_kernels.cuda import graphs
from tests.fixtures.engines import make_engine, request, run, submit
from tests.fixtures.peft_adapters import TestAdapter
from tests.kernels.cuda.shim_ops import ShimOps
from tests.kernels.cuda.steps import decode_steps_of, served, use_reference
from tests.kernels.cuda.test_engine import adapters, base, ops  # noqa: F401


def test_requests_of_the_same_tokens_share_blocks_while_they_decode(
    base: BaseModel,  # noqa: F811
    adapters: list[TestAdapter],  # noqa: F811
    ops: ShimOps,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When a block is full, the twin's is replaced, and soon taken by another request."""
    monkeypatch.setattr(graphs, "SIZES", (4,))
    monkeypatch.setattr(graphs, "KINDS", (Parts.NONE, Parts.LORA))
    requests = [request(str(i), range(3, 13), [None, adapters[0]][i // 2], max_tokens=34) for i in range(4)]
    engine = make_engine(base, adapters)
    decode_steps = decode_steps_of(engine, monkeypatch)
    got = served(engine, requests, joins=4)
    assert len(ops.replayed) == len(decode_steps) > 30
    use_reference(monkeypatch)
    assert got == served(make_engine(base, adapters), requests, joins=4)


def test_what_is_recorded_for_adapters_with_more_serves_the_others(
    base: BaseModel,  # noqa: F811
    adapters: list[TestAdapter],  # noqa: F811
    ops: ShimOps,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "SIZES", (4,))
    requests = [request(str(i), range(3 + i, 13), [None, adapters[0]][i % 2], max_tokens=4 + 3 * i) for i in range(3)]
    engine = make_engine(base, adapters, graph_bytes=1)
    assert [shape.kind for shape in cast(Any, engine._model)._captures._captured] == [graphs.KINDS[-1]]
    decode_steps = decode_steps_of(engine, monkeypatch)
    got = served(engine, requests, joins=3)
    assert len(ops.replayed) == len(decode_steps) >= 8
    use_reference(monkeypatch)
    assert got == served(make_engine(base, adapters), requests, joins=3)


def test_after_a_step_without_memory_the_tables_are_sent_again(
    base: BaseModel,  # noqa: F811
    ops: ShimOps,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The step in which new blocks would have been sent fails its longest request."""
    monkeypatch.setattr(graphs, "SIZES", (4,))
    monkeypatch.setattr(graphs, "KINDS", (Parts.NONE,))
    requests = [request(str(i), range(3 + i, 15 + i), max_tokens=12) for i in range(2)]
    engine = make_engine(base)
    compute, failed = graphs.DecodeGraphs.__call__, list[int]()

    def without_memory(captured: graphs.DecodeGraphs, step: DecodeStep) -> Tensor:
        if step.places and step.positions.max() >= 16 and not failed:
            failed.append(len(step.token_ids))
            raise torch.OutOfMemoryError
        return compute(captured, step)

    monkeypatch.setattr(graphs.DecodeGraphs, "__call__", without_memory)
    submit(engine, requests)
    out: dict[str, list[int]] = {"0": [], "1": []}
    while engine.has_work:
        for token in engine.step():
            out[token.request_id].append(-1 if token.token_id is None else token.token_id)
    assert failed == [2]
    use_reference(monkeypatch)
    expected = run(make_engine(base), requests)
    gone = next(name for name, tokens in out.items() if tokens[-1] == -1)
    assert out[gone] == [*expected.pop(gone)[: len(out[gone]) - 1], -1]
    assert {name: out[name] for name in expected} == expected
