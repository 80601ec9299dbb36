"""Multipart uploads to S3: an object's parts are sent in parallel."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from loray.store.aws import NUM_CONNECTIONS

PART_BYTES = 8 << 20

_MAX_PARTS = 10_000  # S3's own limit


class Source(NamedTuple):
    """Bytes in memory, or a file. Several threads may read it."""

    data: bytes | Path
    num_bytes: int

    @classmethod
    def of(cls, data: bytes | Path) -> Source:
        return cls(data, len(data) if isinstance(data, bytes) else data.stat().st_size)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        with io.BytesIO(self.data) if isinstance(self.data, bytes) else self.data.open("rb") as f:
            yield f

    def read(self, start: int, num_bytes: int) -> bytes:
        with self.open() as f:
            f.seek(start)
            return f.read(num_bytes)


def upload_parts(client: Any, target: Mapping[str, str], source: Source) -> Sequence[Mapping[str, Any]]:
    """Send all parts of the multipart upload `target`. Returns the list of parts for CompleteMultipartUpload.

    Raises boto3's errors, after all transfers have ended.
    """
    part_bytes = max(PART_BYTES, -(-source.num_bytes // _MAX_PARTS))

    def upload(number: int) -> dict[str, Any]:
        body = source.read((number - 1) * part_bytes, part_bytes)
        sent = client.upload_part(**target, PartNumber=number, Body=body, ChecksumAlgorithm="CRC32")
        return {"PartNumber": number, **{name: sent[name] for name in ("ETag", "ChecksumCRC32") if name in sent}}

    pool = ThreadPoolExecutor(NUM_CONNECTIONS, thread_name_prefix="s3-upload")
    try:
        return list(pool.map(upload, range(1, max(1, -(-source.num_bytes // part_bytes)) + 1)))
    finally:
        pool.shutdown(cancel_futures=True)
