"""The client, in a process of its own: it reads sockets and counts events, so that it costs less than the server.

    python -m benchmarks.front.client '{"port": 8000, "pid": 1, "body": {…}, "connections": 64, "seconds": 5}'
    python -m benchmarks.front.client '{"port": 8000, "pid": 1, "body": {…}, "rate": 50, "seconds": 5}'

With `connections` as many requests are under way at any time, and the events of the last `seconds` are counted; with
`rate` so many requests a second are sent, from `begin_at` on, and each is timed. `key`: an API key to send. It prints
one JSON object.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from collections import deque
from typing import Any

from benchmarks.processes import cpu_seconds

_EVENT = b"data: {"
_END = b"\r\n0\r\n\r\n"
_WARM_UP_S = 1.0
_RECEIVE = 1 << 18


class Stream:
    """One connection, with at most one request at a time."""

    def __init__(self, port: int, request: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._request = request
        self._tail = b""
        self.began = self.first = 0.0
        self.num_events = 0

    def send(self, began: float) -> None:
        self.began, self.first, self.num_events, self._tail = began, 0.0, 0, b""
        self.socket.sendall(self._request)

    def receive(self) -> tuple[int, bool]:
        """New events, and whether the response has ended."""
        data = self.socket.recv(_RECEIVE)
        if not data:
            raise SystemExit("the server closed a connection")
        if not self.first:
            if not data.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"the server answered:\n{data.decode(errors='replace')[:500]}")
            self.first = time.perf_counter()
        data = self._tail + data
        num_events = data.count(_EVENT)
        self.num_events += num_events
        self._tail = data[-(len(_EVENT) - 1) :]
        return num_events, data.endswith(_END)


def http_request(body: dict[str, Any], path: str, key: str | None = None) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    if key is not None:
        head += f"authorization: Bearer {key}\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def flood(port: int, pid: int, request: bytes, connections: int, seconds: float) -> dict[str, float]:
    """Events a second, the server's processor seconds and its events, from one moment under way to another."""
    selector = selectors.DefaultSelector()
    for stream in (Stream(port, request) for _ in range(connections)):
        selector.register(stream.socket, selectors.EVENT_READ, stream)
        stream.send(time.perf_counter())
    begins_at = time.perf_counter() + _WARM_UP_S
    began = cpu = own = 0.0
    found: dict[str, float] = {}
    num_events = num_whole = num_whole_events = 0
    while not found or not num_whole:
        now = time.perf_counter()
        if not began and now >= begins_at:
            began, cpu, own, num_events = now, cpu_seconds(pid), time.process_time(), 0
        elif began and not found and now >= began + seconds:
            found = {
                "seconds": now - began,
                "events": num_events,
                "server_cpu_s": cpu_seconds(pid) - cpu,
                "client_cpu_s": time.process_time() - own,
            }
        for key, _ in selector.select():
            stream = key.data
            more, ended = stream.receive()
            num_events += more
            if ended:
                num_whole += 1
                num_whole_events += stream.num_events
                stream.send(now)
    return found | {"events_per_response": num_whole_events / num_whole}


def paced(
    port: int, request: bytes, rate: float, seconds: float, begin_at: float | None = None
) -> dict[str, list[float]]:
    """When each request was due, and seconds to its first byte and to its end; a late sending counts as latency.

    `begin_at`: of `time.perf_counter`; None: at once.
    """
    selector = selectors.DefaultSelector()
    free: deque[Stream] = deque()
    began_s: list[float] = []
    first: list[float] = []
    whole: list[float] = []
    num_sent, num_requests = 0, int(rate * seconds)
    began = time.perf_counter() + 0.1 if begin_at is None else begin_at
    while len(whole) < num_requests:
        due = began + num_sent / rate
        now = time.perf_counter()
        if num_sent < num_requests and now >= due:
            if free:
                stream = free.popleft()
            else:
                stream = Stream(port, request)
                selector.register(stream.socket, selectors.EVENT_READ, stream)
            stream.send(due)
            num_sent += 1
            continue
        for key, _ in selector.select(max(0.0, due - now) if num_sent < num_requests else None):
            stream = key.data
            if stream.receive()[1]:
                began_s.append(stream.began)
                first.append(stream.first - stream.began)
                whole.append(time.perf_counter() - stream.began)
                free.append(stream)
    for stream in free:
        stream.socket.close()
    selector.close()
    return {"began_s": began_s, "first_s": first, "whole_s": whole}


def main() -> None:
    setup = json.loads(sys.argv[1])
    request = http_request(setup["body"], setup["path"], setup.get("key"))
    found: dict[str, Any]
    if "rate" in setup:
        found = dict(paced(setup["port"], request, setup["rate"], setup["seconds"], setup.get("begin_at")))
    else:
        found = dict(flood(setup["port"], setup["pid"], request, setup["connections"], setup["seconds"]))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
