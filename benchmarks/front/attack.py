"""Sends bodies that must be refused, in a process of its own, one after the other.

    python -m benchmarks.front.attack '{"port": 8000, "model": "smollm2", "limit": 1048576, "names": ["10,000 choices"],
        "repeat": 5, "begin_at": 12.5, "interval_s": 0.6}'

`begin_at` is a value of `time.perf_counter`, which is the same in all processes of a machine. It prints one JSON
object: for each body when it was sent, when its refusal came, its status and its size.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from typing import Any, NamedTuple

from benchmarks.front.bodies import BODIES, NUMBER

_PIECE = 1 << 18
_LARGE = 1 << 20  # such bodies have no constraint, and are not searched
_TIMEOUT_S = 60.0


class Refusal(NamedTuple):
    """`status` 0: the connection was closed without one."""

    name: str
    began: float
    ended: float
    status: int
    num_bytes: int


def send(port: int, name: str, request: bytes) -> Refusal:
    """Sends a request, and reads while it sends, because a refusal may come before the end."""
    left, received = memoryview(request), b""
    began = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), _TIMEOUT_S) as connection:
        connection.setblocking(False)
        while b"\r\n" not in received:
            readable, writable, _ = select.select([connection], [connection] if left else [], [], _TIMEOUT_S)
            try:
                if readable:
                    data = connection.recv(_PIECE)
                    if not data:
                        break
                    received += data
                elif writable:
                    left = left[connection.send(left[:_PIECE]) :]
                else:
                    break
            except ConnectionError:
                break
        ended = time.perf_counter()
    status = int(received.split(b" ", 2)[1]) if received.startswith(b"HTTP/1.1 ") else 0
    return Refusal(name, began, ended, status, len(request))


def attack(setup: dict[str, Any]) -> list[Refusal]:
    requests = {name: BODIES[name](setup["model"], setup["limit"]).request() for name in setup["names"]}
    found, due = [], setup["begin_at"]
    for number in range(setup["repeat"]):
        for name, request in requests.items():
            time.sleep(max(0.0, due - time.perf_counter()))
            found.append(send(setup["port"], name, _numbered(request, number)))
            due = max(due, time.perf_counter()) + setup["interval_s"]
    return found


def _numbered(request: bytes, number: int) -> bytes:
    """With as many characters."""
    digits = str(number).zfill(len(NUMBER)).encode()
    return request if len(request) > _LARGE else request.replace(NUMBER.encode(), digits)


def main() -> None:
    sys.stdout.write(json.dumps({"refusals": attack(json.loads(sys.argv[1]))}) + "\n")


if __name__ == "__main__":
    main()
