"""Sends requests with wrong keys, each with another one, in a process of its own.

    python -m benchmarks.front.keys.strangers '{"port": 8000, "path": "/v1/completions", "body": {…}, "rate": 1000,
        "seconds": 5, "begin_at": 12.5}'

`begin_at` is a value of `time.perf_counter`, which is the same in all processes of a machine. It prints one JSON
object: how many answers had which status, and the seconds from `begin_at` to the last answer.
"""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import sys
import time
from collections import Counter, deque
from typing import Any

from benchmarks.front.client import http_request
from loray.spec import KEY_START

_RECEIVE = 1 << 16
_END_OF_HEADERS = b"\r\n\r\n"
_LENGTH = b"content-length: "
_KEY = "KEY"
_MAX_CONNECTIONS = 64  # with more, a server that is slow for a moment would run out of files


class Stranger:
    """One connection, with at most one request at a time."""

    def __init__(self, port: int, request: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._request, self._received = request, b""

    def send(self) -> None:
        self._received = b""
        self.socket.sendall(self._request.replace(_KEY.encode(), secrets.token_urlsafe(32).encode(), 1))

    def receive(self) -> int | None:
        """The status, once the whole answer has come."""
        data = self.socket.recv(_RECEIVE)
        if not data:
            raise SystemExit("the server closed a connection")
        self._received += data
        head, end, content = self._received.partition(_END_OF_HEADERS)
        if not end:
            return None
        length = int(head.lower().partition(_LENGTH)[2].partition(b"\r\n")[0])
        return int(head.split(b" ", 2)[1]) if len(content) >= length else None


def ask(setup: dict[str, Any]) -> dict[str, Any]:
    request = http_request(setup["body"], setup["path"], KEY_START + _KEY)
    selector = selectors.DefaultSelector()
    free: deque[Stranger] = deque()
    statuses: Counter[int] = Counter()
    for _ in range(_MAX_CONNECTIONS):
        free.append(Stranger(setup["port"], request))
        selector.register(free[-1].socket, selectors.EVENT_READ, free[-1])
    rate, num_requests, num_sent = setup["rate"], int(setup["rate"] * setup["seconds"]), 0
    while statuses.total() < num_requests:
        due, now = setup["begin_at"] + num_sent / rate, time.perf_counter()
        may_send = bool(free) and num_sent < num_requests
        if may_send and now >= due:
            free.popleft().send()
            num_sent += 1
            continue
        for key, _ in selector.select(max(0.0, due - now) if may_send else None):
            if (status := key.data.receive()) is not None:
                statuses[status] += 1
                free.append(key.data)
    seconds = time.perf_counter() - setup["begin_at"]
    for stranger in free:
        stranger.socket.close()
    selector.close()
    return {"statuses": dict(statuses), "seconds": seconds}


def main() -> None:
    sys.stdout.write(json.dumps(ask(json.loads(sys.argv[1]))) + "\n")


if __name__ == "__main__":
    main()
