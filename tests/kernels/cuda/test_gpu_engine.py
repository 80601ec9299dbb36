"""The engine on a GPU: recorded decode steps, the rows that are placed, the tokens that are chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loray.bases.registry import BaseModel
from loray.engine.engine import Engine
from loray.engine.memory.blocks import Extent
from loray.engine.pool.pool import Pool
from loray.spec import GenerateRequest
from loray_kernels import Parts, backend
from loray_kernels.cuda.graphs import DecodeGraphs
from loray_kernels.reference import ReferenceOps
from tests.engine.conftest import adapters, base  # noqa: F401
from tests.fixtures.engines import Spy, make_engine, request, run
from tests.fixtures.peft_adapters import TestAdapter
from tests.fixtures.sampling_mixes import check
from tests.kernels.cuda.cases import near

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.mark.parametrize("rounded", [False, True], ids=["", "many equal logits"])
@pytest.mark.parametrize(("vocab", "spread"), [(1000, 3.0), (128_256, 3.0), (128_256, 0.2)])
def test_tokens_are_the_references(vocab: int, spread: float, rounded: bool) -> None:
    ops = backend("cuda", "cuda")
    check(ops, ReferenceOps(), vocab=vocab, spread=spread, num=60, num_steps=4, rounded=rounded, device="cuda")


def logits_of(engine: Engine, requests: list[GenerateRequest]) -> dict[str, Tensor]:
    spy = Spy(engine)
    run(engine, requests, together=True)
    return {name: torch.stack(rows).cpu() for name, rows in spy.logits.items()}


def rows_of(pool: Pool, extent: Extent) -> Tensor:
    """(layers or 1, elements)"""
    shares = pool.tensor.view(pool.geometry.num_blocks, -1, pool.geometry.capacity(extent.kind))
    return shares[extent.block, :, extent.offset : extent.offset + extent.width * extent.rows]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("names", [(None,), ("r2", "r5", None, "r8", "r2")])
def test_the_engine_replays_decode_steps(
    base: BaseModel,  # noqa: F811
    adapters: dict[str, TestAdapter],  # noqa: F811
    dtype: str,
    names: tuple[str | None, ...],
) -> None:
    own = [None if name is None else adapters[name] for name in names]
    requests = [request(str(i), range(3, 9 + 7 * i), own[i % len(own)], max_tokens=3 + i) for i in range(5)]
    recorded, eager = (make_engine(base, list(adapters.values()), device="cuda", dtype=dtype) for _ in range(2))
    eager._model._steps = None
    graphs = recorded._model._captures
    assert isinstance(graphs, DecodeGraphs)
    known = len(graphs._captured)
    assert known > 0
    expected, got = logits_of(eager, requests), logits_of(recorded, requests)
    assert {shape.kind for shape in graphs._serving} >= {Parts.NONE if names == (None,) else Parts.LORA}
    assert len(graphs._captured) == known  # requests capture nothing
    for name, want in expected.items():
        near(got[name], want, getattr(torch, dtype))


def test_the_engine_places_the_rows_that_the_cpu_places(
    base: BaseModel,  # noqa: F811
    adapters: dict[str, TestAdapter],  # noqa: F811
) -> None:
    """The same allocator gives the same places, so what adapters have in both pools is the same."""
    requests = [request(name, range(3, 20), adapter, max_tokens=3) for name, adapter in adapters.items()]
    engines = [make_engine(base, list(adapters.values()), device=device) for device in ("cuda", "cpu")]
    logits = []
    for engine in engines:
        logits.append({})
        for r in requests:  # one after the other, in an order that is always the same
            logits[-1] |= logits_of(engine, [r])
    for name, want in logits[1].items():
        near(logits[0][name], want, torch.float32)
    pools = [engine.pool for engine in engines]
    for there, here in zip(*(pool._residents for pool in pools), strict=True):
        assert there.extents == here.extents
        for extent in here.extents:
            assert torch.equal(rows_of(pools[0], extent).cpu(), rows_of(pools[1], extent))
