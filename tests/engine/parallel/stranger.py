"""Who reaches an engine's ports and does not know its secret: tries what makes others run a program.

`python -m tests.engine.parallel.stranger HOST PORT PID MARKER`: HOST and PORT of the meeting, PID of rank 0. Writes a
line once it has tried the meeting, and goes on with each port that opens until its input ends.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

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


def main(host: str, port: int, pid: int, marker: str) -> None:
    program = pickle.dumps(Program(marker))
    store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=20))
    for name in ("joined-1", "control/0", "control/1", "data/0", "data/1", "control/0/0", "control/rank_0"):
        store.set(name, program)
    tried: dict[int, list[socket.socket]] = {}
    ends = threading.Event()

    def until_input_ends() -> None:
        sys.stdin.read()
        ends.set()

    threading.Thread(target=until_input_ends, daemon=True).start()
    has_told = False
    while not ends.is_set():
        for opened in ports(pid, host) - tried.keys():
            tried[opened] = []
            for sent in (program, len(program).to_bytes(8, "little") + program, b"\xff" * 64, b""):
                with suppress(OSError):
                    tried[opened].append(socket.create_connection((host, opened), timeout=5))
                    tried[opened][-1].sendall(sent)
        if not has_told:
            print("tried", flush=True)
            has_told = True
        time.sleep(0.001)
    print(len(tried), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
