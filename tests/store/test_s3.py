"""S3's own troubles, on a real server with faults put between it and boto3; and how a bucket is reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ClientError, ConnectionClosedError
from botocore.httpsession import URLLib3Session

from loray.errors import SettingsError, StoreError, UnsupportedError
from loray.locations import S3Location
from loray.store import open_store
from loray.store.s3 import LARGE_BYTES, PART_BYTES, S3Store, UploadPart
from tests.fixtures.calls import at_once, refused
from tests.fixtures.cluster import free_port


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
    wins = at_once(4, lambda i: s3_objects.put_if_absent("big", bytes([i]) * LARGE_BYTES))
    assert wins.count(True) == 1
    assert set(s3_objects.get("big")) == {wins.index(True)}


def test_a_failed_part_leaves_nothing(s3_objects: S3Store, requests: Requests, big: Path) -> None:
    in_parts(s3_objects)
    requests.faults.append(lambda r: answer(r, 400, "Broken") if "partNumber=2" in r.url else None)
    refused(StoreError, "failed in UploadPart: Broken planted", s3_objects.put_if_absent, "big", big)
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
    refused(StoreError, "refuses GetObject", s3_objects.get_to, "big", folder / "out")
    assert list(folder.iterdir()) == []


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
    refused(StoreError, "other writers of 'other'", s3_objects.put_if_absent, "other", b"mine")


@pytest.mark.parametrize("kind", ["PutObject", "CompleteMultipartUpload"])
def test_a_server_without_conditional_writes_is_refused(s3_objects: S3Store, big: Path, kind: str) -> None:
    in_parts(s3_objects)

    def ignore(params: dict[str, Any], **_: Any) -> None:
        params["headers"].pop("If-None-Match", None)

    s3_objects._client.meta.events.register(f"before-call.s3.{kind}", ignore)
    refused(UnsupportedError, f"ignores If-None-Match in {kind}", s3_objects.put_if_absent, "key", big)
    assert list(s3_objects.list()) == []


def test_a_server_that_says_so_is_refused(s3_objects: S3Store) -> None:
    requests = Requests(s3_objects)
    requests.faults.append(lambda r: answer(r, 501, "NotImplemented"))
    refused(UnsupportedError, "does not implement what PutObject asks for", s3_objects.check)


def test_long_lists_come_in_pages(s3_objects: S3Store, requests: Requests) -> None:
    for i in range(5):
        s3_objects.put_if_absent(f"k{i}", b"")
    s3_objects._client.meta.events.register(
        "provide-client-params.s3.ListObjectsV2", lambda params, **_: {**params, "MaxKeys": 2}
    )
    requests.sent.clear()
    assert list(s3_objects.list()) == [f"k{i}" for i in range(5)]
    assert len(requests.sent) >= 3


def test_prefixes_are_stores_of_their_own(s3_location: S3Location) -> None:
    one, two = S3Store(s3_location), S3Store(replace(s3_location, prefix=s3_location.prefix + "2"))
    assert one.put_if_absent("a", b"one")
    assert two.put_if_absent("a", b"two")
    assert (one.get("a"), two.get("a"), list(one.list())) == (b"one", b"two", ["a"])
    whole = S3Store(replace(s3_location, prefix=""))
    assert whole.get(f"{s3_location.prefix}/a") == b"one"


def test_objects_are_encrypted_with_the_key(s3_location: S3Location) -> None:
    """The local server has no KMS: what counts is that every request that makes an object names the key."""
    store = S3Store(replace(s3_location, kms_key_id="key-1"))
    requests = Requests(store)
    requests.faults.append(lambda r: answer(r, 400, "NoKms"))
    for put in (store._put_whole, store._put_in_parts):
        refused(ClientError, "NoKms", put, "x", UploadPart(b"x", 1))
    for headers in requests.headers:
        assert headers["x-amz-server-side-encryption"] == "aws:kms"
        assert headers["x-amz-server-side-encryption-aws-kms-key-id"] == "key-1"
    assert len(requests.headers) == 2


def test_wrong_keys(s3_location: S3Location, tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = LORAY1\naws_secret_access_key = wrong\n")
    store = S3Store(replace(s3_location, credentials_file=file))
    for use in (store.check, lambda: store.get("x"), lambda: store.exists("x"), lambda: list(store.list())):
        refused(StoreError, "check the keys", use)


def test_a_missing_bucket_is_named(s3_location: S3Location, tmp_path: Path) -> None:
    store = S3Store(replace(s3_location, bucket="nobody-made-this"))
    for use in (
        store.check,
        lambda: store.put_if_absent("x", b""),
        lambda: store.get("x"),
        lambda: store.get_to("x", tmp_path / "x"),
        lambda: store.exists("x"),
        lambda: list(store.list()),
    ):
        refused(StoreError, "aws s3 mb s3://nobody-made-this", use)


def test_a_server_that_is_down(s3_location: S3Location) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    store = S3Store(replace(s3_location, endpoint_url=endpoint))
    refused(StoreError, f"{endpoint} cannot be reached.*`loray up`", store.get, "x")
    elsewhere = S3Store(replace(s3_location, endpoint_url="http://no-such-host.invalid"))
    elsewhere._client.meta.events.register("needs-retry.s3", lambda **_: None)
    refused(StoreError, r"no-such-host\.invalid cannot be reached.*check endpoint_url", elsewhere.get, "x")


def test_keys_come_from_the_file_or_from_aws(
    s3_location: S3Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert s3_location.credentials_file is not None
    bare = replace(s3_location, credentials_file=None)
    refused(StoreError, "there are no keys", open_store(bare.url).check)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(s3_location.credentials_file))
    open_store(bare.url).check()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_location.endpoint_url or "")
    open_store(replace(bare, endpoint_url=None, region=None).url).check()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-something-else")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-something-else")
    open_store(s3_location.url).check()  # the file that the URL names goes first


def test_a_wrong_credentials_file(s3_location: S3Location, tmp_path: Path) -> None:
    refused(SettingsError, "cannot be read", S3Store, replace(s3_location, credentials_file=tmp_path / "none"))
    (tmp_path / "empty").write_text("[other]\n")
    with pytest.raises(SettingsError, match=r"needs a section \[default\]"):
        S3Store(replace(s3_location, credentials_file=tmp_path / "empty"))
