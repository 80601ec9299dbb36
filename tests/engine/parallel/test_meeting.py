"""Where ranks meet: at one address, and only those that know the engine's secret."""

from __future__ import annotations

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]

from loray.engine.parallel import communicator
from loray.engine.parallel.communicator import Communicator
from loray.engine.parallel.shard import Shard
from loray.engine.parallel.transport import joined, meeting, open_meeting

HOST, CPU = "127.0.0.1", torch.device("cpu")
SECRET, OTHER = b"s" * 32, b"o" * 32


def listening() -> set[str]:
    """The addresses, in hexadecimal, at which this process listens."""
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            inodes.add(os.readlink(f"/proc/self/fd/{fd}").removeprefix("socket:[").removesuffix("]"))
        except OSError:  # it was the folder's own
            continue
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return {local for _, local, _, state, *_, inode in (f[:10] for f in lines) if state == "0A" and inode in inodes}


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
    assert {address.partition(":")[0] for address in added} == {"0100007F"}
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
