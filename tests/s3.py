"""The session's S3 server, with real requests and keys, on 127.0.0.1 only. The first test that uses it starts it."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from loray.local.s3 import LocalS3, current_local_s3, start_local_s3, stop_local_s3
from loray.store.s3 import create_bucket


@dataclass(frozen=True)
class S3Server:
    local: LocalS3
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def url(self, bucket: str = "tests", prefix: str = "") -> str:
        """A store URL of a new, empty bucket whose name begins with `bucket`."""
        location = self.local.location(f"{bucket}-{next(self._numbers)}", prefix)
        create_bucket(location)
        return location.url


@contextmanager
def started_s3() -> Iterator[LocalS3]:
    """A server with a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="loray-s3-"))
    try:
        yield start_local_s3(folder)
    finally:
        server = current_local_s3(folder)
        if server is not None:
            os.kill(server.pid, signal.SIGKILL)  # otherwise it would save its data first
        stop_local_s3(folder)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class CountedS3:
    """`read` has the path /BUCKET/KEY of each request for an object's content that came to `url`."""

    url: str
    read: list[str] = field(default_factory=list)


@contextmanager
def counted_s3(server: LocalS3) -> Iterator[CountedS3]:
    """Passes bytes to the server and back, and reads the requests on the way."""
    target = urlsplit(server.location("any").endpoint_url)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        counted = CountedS3(f"http://127.0.0.1:{listener.getsockname()[1]}")
        opened: list[socket.socket] = []
        threads: list[threading.Thread] = []

        def passes(source: socket.socket, sink: socket.socket, is_request: bool) -> None:
            with suppress(OSError):
                while data := source.recv(1 << 16):
                    if is_request:
                        found = re.findall(rb"^GET ([^? ]+)(?:\?x-id=GetObject)? HTTP", data, re.MULTILINE)
                        counted.read.extend(unquote(path.decode()) for path in found)
                    sink.sendall(data)
            with suppress(OSError):
                sink.shutdown(socket.SHUT_WR)

        def accepts() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    there = socket.create_connection((str(target.hostname), target.port or 80))
                    opened.extend((client, there))
                    for arguments in ((client, there, True), (there, client, False)):
                        threads.append(threading.Thread(target=passes, args=arguments))
                        threads[-1].start()

        accepting = threading.Thread(target=accepts)
        accepting.start()
        try:
            yield counted
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for each in opened:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
            for each in opened:
                each.close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with started_s3() as server:
        yield S3Server(server)
