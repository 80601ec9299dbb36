"""What a decode step sends to the device: the block tables there are kept up to date by changes alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from loray.engine.memory.blocks import BlockAllocator, Geometry
from loray.engine.memory.kv_cache import KVCacheManager
from loray.engine.model.decode_batch import DecodeBatch, DecodeSteps
from loray.engine.pool.pool import AdapterDescriptor
from loray.engine.request import Chunk, Request, RequestState
from loray.spec import GenerateRequest, SamplingParams
from loray_kernels import Parts

MAX_BLOCKS = 4


class Device:
    """Block tables as the steps fill them."""

    def __init__(self, num_slots: int = 3) -> None:
        self.steps = DecodeSteps(num_slots=num_slots, max_blocks=MAX_BLOCKS, max_rows=8)
        self.tables = np.full(num_slots * MAX_BLOCKS, -1)
        self.adapters: dict[Request, Any] = {}

    def refuses(self, *chunks: Chunk) -> bool:
        planned = list(chunks)
        return self.steps.batch(planned, lambda chunk: self.adapters.get(chunk.request)) is planned

    def step(self, *requests: Request) -> DecodeBatch:
        """The tables then hold the blocks of all rows."""
        batch = self.steps.batch([chunk_of(r) for r in requests], lambda chunk: self.adapters.get(chunk.request))
        assert isinstance(batch, DecodeBatch)
        self.tables[list(batch.step.places)] = batch.step.blocks
        for chunk, slot in zip(batch.sampled, batch.step.slots, strict=True):
            own = chunk.request.blocks
            assert self.tables[slot * MAX_BLOCKS :][: len(own)].tolist() == own
        assert batch.step.positions.tolist() == [c.start for c in batch.sampled]
        assert batch.step.token_ids.tolist() == [c.request.output_ids[-1] for c in batch.sampled]
        return batch


def chunk_of(request: Request) -> Chunk:
    return Chunk(request, request.num_computed, 1)


def running(name: str, blocks: list[int], num_outputs: int = 1) -> Request:
    request = Request(GenerateRequest(name, (5, 6, 7), SamplingParams(max_tokens=99)), 0, RequestState.RUNNING)
    request.output_ids = list(range(10, 10 + num_outputs))
    request.num_computed, request.blocks = 2 + num_outputs, blocks
    return request


def advance(request: Request) -> None:
    request.output_ids.append(request.num_computed)
    request.num_computed += 1


def adapter(start: int | None, pair: int | None = None, **fields: Any) -> Any:
    """With a descriptor of nine words from `start` on; with a VeRA pair in a run of blocks from `pair` on."""
    descriptor = None
    if start is not None and pair is None:
        descriptor = AdapterDescriptor(start, 9, Parts.LORA, start, 0, None)
    elif start is not None:
        descriptor = AdapterDescriptor(start, 9, Parts.VERA, None, start, start + 5)
    run = None if pair is None else SimpleNamespace(first_block=pair)
    return SimpleNamespace(**{"descriptor": descriptor, "pair": run, "token_row": {}} | fields)


def test_only_new_blocks_are_sent() -> None:
    device, a, b = Device(), running("a", [7, 8]), running("b", [3])
    first = device.step(a, b)
    assert sorted(first.step.blocks) == [3, 7, 8]
    advance(a)
    advance(b)
    a.blocks.append(9)
    second = device.step(a, b)
    assert second.step.blocks == [9]
    assert second.step.slots is first.step.slots  # nothing is arranged again
    a.blocks = [1, 8, 2]  # moved, or preempted and back
    assert device.step(a, b).step.blocks == [1, 2]
    a.blocks = [1]
    device.step(a, b)
    a.blocks.append(8)
    assert device.step(a, b).step.blocks == [8]


def test_a_block_that_the_prefix_cache_replaces_is_sent() -> None:
    """Two requests compute the same tokens side by side, past a block's end: one of them gets the other's block."""
    allocator = BlockAllocator(Geometry(num_blocks=9, num_layers=1, block_tokens=4, layer_share=4))
    adapters = cast(Any, SimpleNamespace(inflation=None))
    blocks = KVCacheManager(allocator, adapters, lambda: 0.0, enable_prefix_caching=True)
    device, twins = Device(), [running(name, []) for name in "ab"]
    for _ in range(9):
        for twin in twins:
            assert blocks.extend(twin, twin.num_computed + 1)
        device.step(*twins)  # looks at the whole table
        for twin in twins:
            advance(twin)
            blocks.share(twin)
    assert twins[0].blocks[:-1] == twins[1].blocks[:-1]


def test_a_step_that_is_not_recorded_leaves_the_tables_as_they_were() -> None:
    device, a, prompt = Device(), running("a", [1]), running("prompt", [2], num_outputs=0)
    assert device.refuses(chunk_of(a), chunk_of(prompt))
    prompt.state = RequestState.FINISHED
    assert device.step(a).step.blocks == [1]


def test_slots_of_requests_that_have_left_are_given_again() -> None:
    device = Device(num_slots=2)
    a, b, c = running("a", [7]), running("b", [8]), running("c", [9, 10])
    device.step(a, b)
    a.state, a.blocks = RequestState.FINISHED, []
    device.step(b, c)
    advance(c)
    device.step(c)
    advance(b)
    assert device.step(b, c).step.blocks == []


def test_rows_of_one_adapter_are_neighbours_four_at_a_time() -> None:
    device = Device(num_slots=8)
    rows = [running(str(i), [i]) for i in range(8)]
    one, other = adapter(50), adapter(0)
    device.adapters = {r: one for r in rows if r.request_id not in "03"} | {rows[3]: other}
    batch = device.step(*rows)
    assert [c.request.request_id for c in batch.sampled] == ["0", "3", "1", "2", "4", "5", "6", "7"]
    assert batch.step.items.tolist() == [0, 1, 1, 50, 2, 4, 50, 6, 2]
    assert batch.residents == (one, other) or batch.residents == (other, one)


def test_rows_that_share_a_pair_are_neighbours_and_name_their_vectors() -> None:
    device = Device(num_slots=8)
    rows = [running(str(i), [i]) for i in range(8)]
    one, two, other, lora = adapter(70, pair=3), adapter(20, pair=3), adapter(40, pair=9), adapter(60)
    device.adapters = {rows[0]: one, rows[1]: other, rows[2]: two, rows[4]: lora} | {rows[i]: one for i in (5, 6, 7)}
    batch = device.step(*rows)
    assert [c.request.request_id for c in batch.sampled] == ["3", "4", "2", "0", "5", "6", "7", "1"]
    assert batch.step.items.tolist() == [60, 1, 1]
    assert batch.step.pairs.tolist() == [25, 2, 4, 25, 6, 1, 45, 7, 1]
    assert batch.step.vectors.tolist() == [0, 0, 20, 70, 70, 70, 70, 40]
    assert batch.step.parts == Parts.LORA | Parts.VERA
    assert batch.step.own_rows.size == 0


def test_embedding_rows_are_found_for_each_token() -> None:
    device, a, b = Device(), running("a", [1]), running("b", [2])
    own = adapter(30, token_row={3: 500}, descriptor=AdapterDescriptor(30, 9, Parts.OWN, None, 30, None))
    device.adapters = {a: own}
    first = device.step(a, b)
    assert first.step.own_rows.tolist() == [-1, -1]
    assert first.step.parts == Parts.OWN
    advance(a)  # to token 3
    own.token_row = {3: 700}  # its rows are moved between steps
    second = device.step(a, b)
    assert dict(zip((c.request for c in second.sampled), second.step.own_rows.tolist(), strict=True)) == {a: 700, b: -1}


def test_adapters_without_a_descriptor_are_not_in_a_captured_step() -> None:
    device, a = Device(), running("a", [1])
    device.adapters = {a: cast(Any, adapter(None))}
    assert device.refuses(chunk_of(a))


def test_other_steps_are_not_recorded() -> None:
    device, forced, prompt = Device(), running("forced", [1]), running("prompt", [1], num_outputs=0)
    forced.output_ids.append(11)  # one of two tokens
    assert device.refuses(chunk_of(forced))
    assert device.refuses(chunk_of(prompt))
    long = running("long", [1, 2, 3, 4, 5])
    assert device.refuses(chunk_of(long))
    assert device.refuses(Chunk(forced, 3, 2))


def turns(device: Device, requests: list[Request], num_steps: int) -> list[str]:
    """The requests that each step has; those of recorded steps in capitals."""
    found = []
    for _ in range(num_steps):
        batch = device.steps.batch([chunk_of(r) for r in requests], lambda chunk: device.adapters.get(chunk.request))
        recorded = isinstance(batch, DecodeBatch)
        own = batch.sampled if isinstance(batch, DecodeBatch) else batch
        names = "".join(sorted(chunk.request.request_id for chunk in own))
        found.append(names.upper() if recorded else names)
        for chunk in own:
            advance(chunk.request)
    return found


@pytest.mark.parametrize(
    ("num_apart", "expected"),
    [
        (0, ["ABCDEF"] * 8),
        (1, ["BCDEF", "BCDEF", "BCDEF", "a"] * 2),
        (2, ["CDEF", "CDEF", "ab"] * 2 + ["CDEF"] * 2),
        (5, ["F", "abcde"] * 4),
        (6, ["abcdef"] * 8),
    ],
)
def test_requests_without_a_record_have_steps_of_their_own(num_apart: int, expected: list[str]) -> None:
    """The others stay in recorded ones; nobody waits for more than three steps."""
    device, requests = Device(num_slots=8), [running(name, [i]) for i, name in enumerate("abcdef")]
    device.adapters = {r: adapter(None) for r in requests[:num_apart]}
    assert turns(device, requests, 8) == expected


def test_a_request_that_outgrows_its_table_has_steps_of_its_own_from_then_on() -> None:
    device, a, long = Device(), running("a", [9]), running("l", [1, 2, 3, 4])
    assert turns(device, [a, long], 2) == ["AL", "AL"]
    long.blocks.append(5)
    assert turns(device, [a, long], 4) == ["l", "A", "l", "A"]
