"""An engine that computes nothing, in its own process, with a replica's end of the channel.

    python -m benchmarks.front.replica

The first line of its input is {"address": {…}, "token_ids": […]}; each further one is a new stream and its number of
tokens, or "step": a token of every stream in one frame.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence

from benchmarks.front.engines import NODE
from loray.engine.request import TokenOutput
from serve_apps.channel.connection import Connection, connect
from serve_apps.channel.frames import ChannelAddress

_READ_BYTES = 1 << 16


class Streams:
    def __init__(self, connection: Connection, token_ids: Sequence[int]) -> None:
        self._connection, self._token_ids = connection, token_ids
        self._left: dict[int, int] = {}  # tokens, by stream

    def take(self, line: bytes) -> None:
        if line == b"step":
            self._step()
        else:
            stream, num_tokens = map(int, line.split())
            self._left[stream] = num_tokens
            self._connection.watch(stream, lambda _: self._drop(stream))

    def _step(self) -> None:
        outputs = []
        for stream, left in list(self._left.items()):
            token = self._token_ids[left % len(self._token_ids)]
            outputs.append((stream, TokenOutput(str(stream), token, None, "length" if left == 1 else None)))
            self._left[stream] = left - 1
            if left == 1:
                self._connection.unwatch(stream)
                self._drop(stream)
        self._connection.send(outputs)

    def _drop(self, stream: int) -> None:
        self._left.pop(stream, None)


def _first_line() -> bytes:
    """Without reading ahead, as sys.stdin does."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            raise SystemExit("no setup came")
        line += byte
    return line


async def main() -> None:
    setup = json.loads(_first_line())
    connection = await connect(ChannelAddress(**setup["address"]), NODE, "front#0")
    streams, ended, rest = Streams(connection, setup["token_ids"]), asyncio.Event(), b""

    def read() -> None:
        nonlocal rest
        data = os.read(sys.stdin.fileno(), _READ_BYTES)
        if not data:
            ended.set()
            return
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            streams.take(line)

    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin, read)
    await ended.wait()
    loop.remove_reader(sys.stdin)
    connection.close()


if __name__ == "__main__":
    asyncio.run(main())
