"""S3's own troubles, on a real server with faults put between it and boto3."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ConnectionClosedError
from botocore.httpsession import URLLib3Session

from loray.errors import StoreError, UnsupportedError
from loray.locations import S3Location
from loray.store.s3 import LARGE_BYTES, PART_BYTES, S3Store


class Requests:
    """What a store sends, as "PUT key?query"; `faults` answer or raise in the server's place."""

    def __init__(self, store: S3Store) -> None:
        self.sent: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.faults: list[Callable[[Any], Any]] = []
        self._prefix = f"/{store.location.bucket}/{store.location.prefix}/"
        store._client.meta.events.register("before-send.s3", self._before)

    def _before(self, request: Any, **_: Any) -> Any:
        what = f"{request.method} /{request.url.split('/', 3)[3]}".replace(self._prefix, "")
        self.sent.append(what)
        self.headers.append({k: v.decode() if isinstance(v, bytes) else v for k, v in request.headers.items()})
        for fault in self.faults:
            answer = fault(request)
            if answer is not None:
                return answer
        return None

    def matching(self, text: str) -> list[str]:
        return [request for request in self.sent if text in request]


@pytest.fixture
def requests(s3_objects: S3Store) -> Requests:
    s3_objects.check()
    return Requests(s3_objects)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """Just over the limit: three parts, the last one short."""
    path = tmp_path / "big"
    path.write_bytes(bytes(range(251)) * ((LARGE_BYTES + 1000) // 251))
    return path


def in_parts(store: S3Store) -> None:
    """As at AWS."""
    store._parts_from = LARGE_BYTES


def uploads(store: S3Store) -> list[str]:
    """Keys of uploads that were begun and neither completed nor aborted."""
    found = store._client.list_multipart_uploads(Bucket=store.location.bucket).get("Uploads", [])
    return [upload["Key"] for upload in found if upload["Key"].startswith(store.location.prefix)]


def answer(request: Any, status: int, code: str) -> AWSResponse:
    class Raw:
        def stream(self, *_: Any, **__: Any) -> Iterator[bytes]:
            yield f"<Error><Code>{code}</Code><Message>planted</Message></Error>".encode()

    return AWSResponse(request.url, status, {}, Raw())


# -- large objects ----------------------------------------------------------------------------------------------------


def test_large_objects_travel_in_parts(s3_objects: S3Store, requests: Requests, big: Path, tmp_path: Path) -> None:
    in_parts(s3_objects)
    assert s3_objects.put_if_absent("big", big)
    assert len(requests.matching("PUT big?uploadId=")) == 3
    for request, headers in zip(requests.sent, requests.headers, strict=True):
        assert ("x-amz-checksum-crc32" in headers) == request.startswith("PUT")
    requests.sent.clear()
    assert not s3_objects.put_if_absent("big", big)
    assert requests.sent == ["HEAD big"]
    s3_objects.get_to("big", tmp_path / "out")
    assert len(requests.matching("GET big")) == 3
    assert (tmp_path / "out").read_bytes() == s3_objects.get("big") == big.read_bytes()
    assert s3_objects.put_if_absent("from-memory", big.read_bytes())
    assert s3_objects.get("from-memory") == big.read_bytes()
    assert uploads(s3_objects) == []


def test_only_aws_gets_parts(s3_objects: S3Store, requests: Requests, big: Path) -> None:
    """Where two completions at the same moment may both win, one request must do."""
    assert s3_objects.put_if_absent("big", big)
    assert requests.sent == ["HEAD big", "PUT big"]
    assert S3Store(S3Location("bucket", region="us-east-1"))._parts_from == LARGE_BYTES


def test_one_of_many_large_writers_wins(s3_objects: S3Store) -> None:
    s3_objects.check()
    barrier = threading.Barrier(4)

    def put(i: int) -> bool:
        data = bytes([i]) * LARGE_BYTES
        barrier.wait()
        return s3_objects.put_if_absent("big", data)

    with ThreadPoolExecutor(4) as pool:
        wins = list(pool.map(put, range(4)))
    assert wins.count(True) == 1
    assert set(s3_objects.get("big")) == {wins.index(True)}


def test_a_failed_part_leaves_nothing(s3_objects: S3Store, requests: Requests, big: Path) -> None:
    in_parts(s3_objects)
    requests.faults.append(lambda r: answer(r, 400, "Broken") if "partNumber=2" in r.url else None)
    with pytest.raises(StoreError, match="failed in UploadPart: Broken planted"):
        s3_objects.put_if_absent("big", big)
    requests.faults.clear()
    assert uploads(s3_objects) == []
    assert list(s3_objects.list()) == []
    assert s3_objects.put_if_absent("big", big)


def test_a_broken_download_leaves_no_file(s3_objects: S3Store, requests: Requests, big: Path, tmp_path: Path) -> None:
    s3_objects.put_if_absent("big", big)
    second = f"bytes={PART_BYTES}-"
    requests.faults.append(lambda r: answer(r, 403, "AccessDenied") if second in str(r.headers.get("Range")) else None)
    folder = tmp_path / "downloads"
    folder.mkdir()
    with pytest.raises(StoreError, match="refuses GetObject"):
        s3_objects.get_to("big", folder / "out")
    assert list(folder.iterdir()) == []


# -- conditional writes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parted", [False, True])
def test_a_lost_answer_is_no_lost_race(s3_objects: S3Store, requests: Requests, big: Path, parted: bool) -> None:
    """The server did it, we did not hear of it, and the second attempt is told that the key is taken."""
    data: Path | bytes = big if parted else b"mine"
    in_parts(s3_objects)
    s3_objects.put_if_absent("warm", data)
    lost: list[str] = []

    def lose_the_answer(request: Any) -> None:
        if "If-None-Match" in request.headers and not lost:
            lost.append(request.url)
            assert URLLib3Session().send(request).status_code == 200
            raise ConnectionClosedError(endpoint_url=request.url)

    requests.faults.append(lose_the_answer)
    assert s3_objects.put_if_absent("key", data)
    assert lost
    assert not s3_objects.put_if_absent("key", b"theirs")


def test_a_lost_race_after_a_retry_is_lost(s3_objects: S3Store, requests: Requests) -> None:
    s3_objects.put_if_absent("key", b"theirs")
    broken: list[str] = []

    def break_once(request: Any) -> None:
        if "If-None-Match" in request.headers and not broken:
            broken.append(request.url)
            raise ConnectionClosedError(endpoint_url=request.url)

    requests.faults.append(break_once)
    assert not s3_objects.put_if_absent("key", b"mine")
    assert broken
    assert s3_objects.get("key") == b"theirs"


def test_writers_that_collide_try_again(s3_objects: S3Store, requests: Requests) -> None:
    """AWS answers 409 while another conditional write of the key is under way."""
    left = [1, 2]
    requests.faults.append(
        lambda r: answer(r, 409, "ConditionalRequestConflict") if r.method == "PUT" and left and left.pop() else None
    )
    assert s3_objects.put_if_absent("key", b"mine")
    assert requests.sent == ["PUT key"] * 3
    requests.faults = [lambda r: answer(r, 409, "ConditionalRequestConflict")]
    with pytest.raises(StoreError, match="other writers of 'other'"):
        s3_objects.put_if_absent("other", b"mine")


@pytest.mark.parametrize("kind", ["PutObject", "CompleteMultipartUpload"])
def test_a_server_without_conditional_writes_is_refused(s3_objects: S3Store, big: Path, kind: str) -> None:
    in_parts(s3_objects)

    def ignore(params: dict[str, Any], **_: Any) -> None:
        params["headers"].pop("If-None-Match", None)

    s3_objects._client.meta.events.register(f"before-call.s3.{kind}", ignore)
    with pytest.raises(UnsupportedError, match=f"ignores If-None-Match in {kind}"):
        s3_objects.put_if_absent("key", big)
    assert list(s3_objects.list()) == []


def test_a_server_that_says_so_is_refused(s3_objects: S3Store) -> None:
    requests = Requests(s3_objects)
    requests.faults.append(lambda r: answer(r, 501, "NotImplemented"))
    with pytest.raises(UnsupportedError, match="does not implement what PutObject asks for"):
        s3_objects.check()


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_long_lists_come_in_pages(s3_objects: S3Store, requests: Requests) -> None:
    for i in range(5):
        s3_objects.put_if_absent(f"k{i}", b"")
    s3_objects._client.meta.events.register(
        "provide-client-params.s3.ListObjectsV2", lambda params, **_: {**params, "MaxKeys": 2}
    )
    requests.sent.clear()
    assert list(s3_objects.list()) == [f"k{i}" for i in range(5)]
    assert len(requests.sent) >= 3
