"""Requests that no captured step takes, beside others: each kind has steps of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loray.bases.registry import BaseModel
from loray.engine.model.batch import Batch
from loray.engine.model.decode_batch import DecodeBatch
from loray_kernels import descriptors
from tests.fixtures.engines import fill_up, make_engine, request, submit
from tests.fixtures.peft_adapters import TestAdapter
from tests.kernels.cuda.ranks import use_shim_ranks
from tests.kernels.cuda.shim_ops import ShimOps
from tests.kernels.cuda.steps import served, use_reference
from tests.kernels.cuda.test_engine import base, mixed, ops  # noqa: F401


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter of rank 70 has too many for a record."""
    monkeypatch.setattr(descriptors, "MAX_ROWS", 64)


def noted(monkeypatch: pytest.MonkeyPatch, engine: Any) -> list[tuple[bool, set[str]]]:
    """Of steps from now on in which requests decode: whether it is captured, and whose it is."""
    launch, found = engine._model.forward, list[tuple[bool, set[str]]]()

    def forward(batch: Batch | DecodeBatch, *arguments: Any) -> Any:
        if all(chunk.num_tokens == 1 and chunk.request.output_ids for chunk in batch.chunks):
            found.append((isinstance(batch, DecodeBatch), {c.request.request_id for c in batch.chunks}))
        return launch(batch, *arguments)

    monkeypatch.setattr(engine._model, "forward", forward)
    return found


SAMPLING: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 3}, {"repetition_penalty": 1.3}]


def requests_of(mixed: dict[str, TestAdapter]) -> list[Any]:  # noqa: F811
    own = [mixed["r2"], mixed["r70"], None, mixed["r7"], mixed["vera"]]
    return [
        request(str(i), range(3 + i, 12 + i + 5 * (i % 7)), own[i % 5], max_tokens=12 + i % 5, **SAMPLING[i % 3])
        for i in range(10)
    ]


def is_fair(steps: list[tuple[bool, set[str]]]) -> bool:
    """Rows without a descriptor are in no captured step, and no step of theirs has others; both come by turns."""
    apart = {"1", "6"}
    together = [(recorded, own) for recorded, own in steps if own & apart and own - apart]
    as_they_should = all(recorded != bool(own & apart) for recorded, own in steps)
    return not together and as_they_should and len({recorded for recorded, own in steps}) == 2


def test_an_adapter_without_a_record_leaves_the_others_in_recorded_steps(
    base: BaseModel,  # noqa: F811
    mixed: dict[str, TestAdapter],  # noqa: F811
    ops: ShimOps,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tokens are the reference's, in a pool so small that requests are preempted."""
    requests, fields = requests_of(mixed), {"max_num_seqs": 6, "pool_bytes": 280 << 10}
    engine = make_engine(base, list(mixed.values()), **fields)
    fill_up(engine)
    steps = noted(monkeypatch, engine)
    got = served(engine, requests, joins=5)
    assert is_fair(steps)
    assert len(ops.replayed) == sum(recorded for recorded, _ in steps)
    use_reference(monkeypatch)
    other = make_engine(base, list(mixed.values()), **fields)
    fill_up(other)
    assert got == served(other, requests, joins=5)


def test_a_step_without_memory_fails_a_request_of_its_own(
    base: BaseModel,  # noqa: F811
    mixed: dict[str, TestAdapter],  # noqa: F811
    ops: ShimOps,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The longest request has a record, and goes on."""
    engine = make_engine(base, list(mixed.values()))
    forward, failed = engine._model._forward, list[Batch]()

    def without_memory(batch: Batch, *arguments: Any) -> Any:
        if not failed and batch.chunks and all(c.num_tokens == 1 and c.request.output_ids for c in batch.chunks):
            failed.append(batch)
            raise torch.OutOfMemoryError
        return forward(batch, *arguments)

    monkeypatch.setattr(engine._model, "_forward", without_memory)
    submit(engine, [request("0", range(3, 40), mixed["r2"]), request("1", range(3, 9), mixed["r70"])])
    errors, num_tokens = list[str](), 0
    while engine.has_work:
        for token in engine.step():
            errors += [token.request_id] if token.error is not None else []
            num_tokens += token.request_id == "0" and token.token_id is not None
    assert (errors, num_tokens) == (["1"], 8)


def test_so_it_is_on_every_rank(
    base: BaseModel,  # noqa: F811
    mixed: dict[str, TestAdapter],  # noqa: F811
    ops: ShimOps,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = use_shim_ranks(monkeypatch)
    engine = make_engine(base, list(mixed.values()), tensor_parallel_size=2, num_threads=1, max_num_seqs=6)
    try:
        steps = noted(monkeypatch, engine)
        got = served(engine, requests_of(mixed), joins=5)
    finally:
        engine.close()
    assert is_fair(steps)
    for own in ranks:
        assert len(own.replayed) == sum(recorded for recorded, _ in steps)
    use_reference(monkeypatch)
    assert got == served(make_engine(base, list(mixed.values()), max_num_seqs=6), requests_of(mixed), joins=5)
