"""The session's S3 server, with real requests and keys, on 127.0.0.1 only. The first test that uses it starts it."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

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


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with started_s3() as server:
        yield S3Server(server)
