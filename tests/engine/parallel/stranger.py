"""Who reaches an engine's ports and does not know its secret: tries what makes others run a program."""

from __future__ import annotations

import os
import pickle
import socket
import time
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]


class Program:
    """As a pickle, it makes a file where it is read."""

    def __init__(self, marker: str) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self._marker,)


def ports(pid: int, host: str) -> set[int]:
    """At which rank 0 and its children listen."""
    found = set()
    with suppress(psutil.Error):
        rank = psutil.Process(pid)
        for process in (rank, *rank.children(recursive=True)):
            with suppress(psutil.Error):
                found |= {
                    c.laddr.port for c in process.net_connections("tcp") if c.status == "LISTEN" and c.laddr.ip == host
                }
    return found


def attack(host: str, port: int, pid: int, marker: str, told: Connection) -> None:
    """`host` and `port` of the meeting, `pid` of rank 0. Tells when it has tried the meeting, goes on with each port
    that opens until it is told something, and tells how many they were.
    """
    program = pickle.dumps(Program(marker))
    store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=20))
    for name in ("joined-1", "control/0", "control/1", "data/0", "data/1", "control/0/0", "control/rank_0"):
        store.set(name, program)
    tried: dict[int, list[socket.socket]] = {}
    has_told = False
    while not told.poll():
        for opened in ports(pid, host) - tried.keys():
            tried[opened] = []
            for sent in (program, len(program).to_bytes(8, "little") + program, b"\xff" * 64, b""):
                with suppress(OSError):
                    tried[opened].append(socket.create_connection((host, opened), timeout=5))
                    tried[opened][-1].sendall(sent)
        if not has_told:
            told.send("tried")
            has_told = True
        time.sleep(0.001)
    told.send(len(tried))
