"""Steps as bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from loray.engine.model.batch import Batch, build_batch
from loray.engine.parallel import communicator
from loray.engine.request import Chunk, Request
from loray.spec import AdapterRef, GenerateRequest, SamplingParams
from loray_kernels import DecodeStep, Parts
from tests.engine.harness import GREEDY

CPU = torch.device("cpu")


def ref(digest: str) -> AdapterRef:
    return AdapterRef(digest, digest, 1, "lora", "base", 64, 1)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_a_step_comes_back_as_it_was() -> None:
    plain = DecodeStep(numbers(5, 6), numbers(0, 9), numbers(1, 0), numbers())
    own = plain._replace(
        items=numbers(40, 0, 1),
        places=[3, 4],
        blocks=[70, 80],
        parts=Parts.LORA | Parts.OWN,
        vectors=numbers(0, 44),
        pairs=numbers(7, 1, 1),
        own_rows=numbers(-1, 1 << 40),
    )
    for step in (plain, own):
        back = communicator.load_step(communicator.dump_step(step))
        assert back.parts is step.parts
        for name in DecodeStep._fields:
            assert list(np.atleast_1d(getattr(back, name))) == list(np.atleast_1d(getattr(step, name))), name


def test_a_batch_of_passed_chunks_is_the_batch_of_the_chunks() -> None:
    """A prompt's part whose logprobs are wanted, a decoding request, a prompt that only loads, on two adapters."""
    scoring = Request(GenerateRequest("a", tuple(range(40)), SamplingParams(prompt_logprobs=1)), 0)
    decoding = Request(GenerateRequest("b", tuple(range(50, 69)), GREEDY, ref("x")), 1, output_ids=[7, 8])
    loading = Request(GenerateRequest("c", (5, 6), SamplingParams(max_tokens=0), ref("y")), 2)
    for request, blocks in ((scoring, [3, 9, 1]), (decoding, [7, 2]), (loading, [4])):
        request.blocks = blocks
    chunks = [Chunk(scoring, 16, 20), Chunk(decoding, 20, 1), Chunk(loading, 0, 2)]
    numbers, digests = communicator.dump_chunks(chunks)
    assert digests == ("x", "y")
    passed = communicator.load_chunks(numbers, digests)
    assert [c.adapter for c in passed] == [None, "x", "y"]

    def batch(of: Any) -> Batch:
        return build_batch(of, lambda chunk: None, block_tokens=16, hidden_size=8, device=CPU)

    add_waiter, got = batch(chunks), batch(passed)
    for name in ("token_ids_T", "positions_T", "logits_T", "scored_T"):
        assert torch.equal(getattr(got, name), getattr(add_waiter, name)), name
    assert got.attention.query_start == add_waiter.attention.query_start
    assert got.attention.context_len == add_waiter.attention.context_len
    assert all(map(torch.equal, got.attention.block_table, add_waiter.attention.block_table))
    assert torch.equal(got.attention.slot_mapping_T, add_waiter.attention.slot_mapping_T)
