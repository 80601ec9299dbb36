"""Where ranks meet, at one address and only with the secret of their engine, and steps as bytes between them."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]

from loray.engine.model.batch import Batch, ChunkInput, build_batch
from loray.engine.parallel import communicator
from loray.engine.parallel.communicator import Communicator
from loray.engine.parallel.shard import Shard
from loray.engine.parallel.transport import joined, meeting, open_meeting
from loray.engine.request import Chunk, Request
from loray.spec import AdapterRef, GenerateRequest, PoolingParams, SamplingParams
from loray_kernels import DecodeStep, Parts
from tests.fixtures.engines import GREEDY

HOST, CPU = "127.0.0.1", torch.device("cpu")
SECRET, OTHER = b"s" * 32, b"o" * 32


def listening() -> set[tuple[str, int]]:
    """The addresses and ports at which this process listens."""
    return {(c.laddr.ip, c.laddr.port) for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"}


def both(stores: tuple[Store, Store], secrets: tuple[bytes, bytes]) -> list[Communicator | str]:
    """Those of two ranks, in threads; of one that refuses, why."""

    def make(rank: int) -> Communicator | str:
        try:
            return Communicator(stores[rank], Shard(rank, 2), CPU, HOST, secrets[rank])
        except RuntimeError as e:
            return str(e)

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(make, range(2)))


def test_ranks_listen_at_their_own_address_alone() -> None:
    before = listening()
    store, port = open_meeting(HOST, SECRET)
    communicators = both((store, meeting(HOST, port, SECRET)), (SECRET, SECRET))
    leader, follower = communicators
    assert isinstance(leader, Communicator)
    assert isinstance(follower, Communicator)
    added = listening() - before
    assert len(added) >= 3  # the store, and two groups
    assert {address for address, _ in added} == {HOST}
    with socket.socket() as elsewhere, pytest.raises(ConnectionRefusedError):
        elsewhere.connect(("127.0.0.2", port))
    sending = threading.Thread(target=leader.send, args=(b"hello", 1))
    sending.start()
    assert follower.receive(0) == b"hello"
    sending.join()


def test_who_does_not_know_the_secret_finds_and_leaves_nothing() -> None:
    store, port = open_meeting(HOST, SECRET)
    store.set("control/0", "an address")
    stranger = meeting(HOST, port, OTHER)
    stranger.set(joined(1), "")
    assert not store.check([joined(1)])
    assert not stranger.check(["control/0"])
    known = meeting(HOST, port, SECRET)
    known.set(joined(1), "")
    assert store.check([joined(1)])
    assert known.check(["control/0"])


def test_a_rank_that_does_not_know_the_secret_is_sent_nothing() -> None:
    store = HashStore()
    expected = ["rank 1 does not know the engine's secret", "rank 0 does not know the engine's secret"]
    assert both((store, store), (SECRET, OTHER)) == expected


def test_a_silent_rank_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has found the names, and shows nothing."""
    monkeypatch.setattr(communicator, "_FORWARD_TIMEOUT", timedelta(seconds=0.2))
    store, is_over = HashStore(), threading.Event()

    def be_silent() -> None:
        group = communicator._gloo(PrefixStore("control", store), 1, 2, timedelta(seconds=60), HOST)
        is_over.wait()
        del group

    silent = threading.Thread(target=be_silent)
    silent.start()
    try:
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            Communicator(store, Shard(0, 2), CPU, HOST, SECRET)
    finally:
        is_over.set()
        silent.join()


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


def test_the_batch_of_chunks_that_were_sent_is_that_of_the_chunks() -> None:
    """A prompt's part whose logprobs are wanted, a decoding request, a prompt that only loads, on two adapters."""
    scoring = Request(GenerateRequest("a", tuple(range(40)), SamplingParams(prompt_logprobs=1)), 0)
    decoding = Request(GenerateRequest("b", tuple(range(50, 69)), GREEDY, ref("x")), 1, output_ids=[7, 8])
    loading = Request(
        GenerateRequest("c", (5, 6), SamplingParams(max_tokens=0), ref("y"), pooling=PoolingParams(kind="mean")), 2
    )
    for request, blocks in ((scoring, [3, 9, 1]), (decoding, [7, 2]), (loading, [4])):
        request.blocks = blocks
    x, y = (cast(Any, SimpleNamespace(ref=ref(name), pair=None, token_row={}, rows={})) for name in "xy")
    chunks = [Chunk(loading, 0, 2), Chunk(scoring, 16, 20), Chunk(decoding, 20, 1)]
    inputs = [ChunkInput.of(*given) for given in zip(chunks, (y, None, x), strict=True)]
    numbers, digests = communicator.dump_chunks(inputs)
    assert digests == ("y", "x")
    sent = communicator.load_chunks(numbers, [y, x])
    assert [c.adapter for c in sent] == [y, None, x]

    def batch(of: list[ChunkInput]) -> Batch:
        return build_batch(of, block_tokens=16, hidden_size=8, device=CPU)

    expected, got = batch(inputs), batch(sent)
    assert got.adapters.spans == expected.adapters.spans
    assert (expected.chunks, got.chunks) == (tuple(chunks), ())
    assert (got.sampled, got.scored, got.last) == ((), (), expected.last)
    for name in ("token_ids_T", "positions_T", "logits_T", "scored_T"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert got.attention.query_start == expected.attention.query_start
    assert got.attention.context_len == expected.attention.context_len
    assert all(map(torch.equal, got.attention.block_table, expected.attention.block_table))
    assert torch.equal(got.attention.slot_mapping_T, expected.attention.slot_mapping_T)
