"""A bucket of S3 as an object store, with AWS's configuration and boto3's errors as loray's."""

from __future__ import annotations

import configparser
import io
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from loray.errors import LorayError, NotFoundError, SettingsError, StoreError, UnsupportedError
from loray.locations import S3Location
from loray.store.objects import TEMPORARY, ObjectEntry, check_key
from loray.telemetry import get_logger

log = get_logger(__name__)

NUM_CONNECTIONS = 8  # parallel transfers of one object's parts
PART_BYTES = 8 << 20
LARGE_BYTES = 2 * PART_BYTES  # from here on, uploads look first whether the object exists, and transfers are parallel

_MAX_PUT_BYTES = 5 << 30  # S3's own limit
_MAX_PARTS = 10_000  # S3's own limit
_PROBE = f"{TEMPORARY}/conditional-writes"
_MAX_CONFLICTS = 5  # attempts of a write that collides with other writers of the key

_PROFILE = "default"
_DEFAULT_REGION = "us-east-1"  # for servers without regions
_CONNECT_TIMEOUT_S = 5
_READ_TIMEOUT_S = 60
_QUICK_READ_TIMEOUT_S = 5
_MAX_ATTEMPTS = 4  # of each request, with growing pauses
_QUICK_MAX_ATTEMPTS = 2


# -- configuration ----------------------------------------------------------------------------------------------------


class AwsCredentials(NamedTuple):
    access_key: str
    secret_key: str
    session_token: str | None = None


def read_keys(file: Path) -> AwsCredentials:
    """The keys of profile `default` in a shared credentials file. Raises SettingsError where there are none."""
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(file.read_text(encoding="utf-8"), source=str(file))
        profile = parser[_PROFILE]
        return AwsCredentials(
            profile["aws_access_key_id"], profile["aws_secret_access_key"], profile.get("aws_session_token") or None
        )
    except OSError as e:
        raise SettingsError(f"the store's credentials_file {file} cannot be read: {e.strerror}") from e
    except (configparser.Error, KeyError, UnicodeDecodeError) as e:
        raise SettingsError(
            f"the store's credentials_file {file} needs a section [{_PROFILE}] with aws_access_key_id and "
            "aws_secret_access_key"
        ) from e


def endpoint_of(location: S3Location) -> str | None:
    """The endpoint of the URL, else of AWS's environment variables. None means AWS itself."""
    return location.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def region_of(location: S3Location) -> str | None:
    """The region of the URL, else of AWS's environment variables. None means AWS's configuration files."""
    region = location.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return region or (_DEFAULT_REGION if endpoint_of(location) else None)


def connect(location: S3Location, *, quick: bool = False) -> Any:
    """A boto3 client, which several threads may use. It retries requests and verifies checksums. Sends nothing yet.

    `quick` is for small objects: a request fails within seconds instead of minutes. Raises SettingsError where the
    credentials file is wrong.
    """
    import boto3
    from botocore.config import Config
    from botocore.session import get_session

    known = get_session()
    known.register_component("data_loader", _descriptions(known.get_config_variable("data_path")))
    keys = AwsCredentials("", "") if location.credentials_file is None else read_keys(location.credentials_file)
    endpoint = endpoint_of(location)
    session = boto3.session.Session(
        aws_access_key_id=keys.access_key or None,
        aws_secret_access_key=keys.secret_key or None,
        aws_session_token=keys.session_token,
        region_name=region_of(location),
        botocore_session=known,
    )
    return session.client(
        "s3",
        endpoint_url=endpoint,
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"} if endpoint else None,
            retries={"mode": "standard", "total_max_attempts": _QUICK_MAX_ATTEMPTS if quick else _MAX_ATTEMPTS},
            connect_timeout=_CONNECT_TIMEOUT_S,
            read_timeout=_QUICK_READ_TIMEOUT_S if quick else _READ_TIMEOUT_S,
            max_pool_connections=2 * NUM_CONNECTIONS,
            request_checksum_calculation="when_supported",
            response_checksum_validation="when_supported",
        ),
    )


@cache
def _descriptions(data_path: str | None) -> Any:
    """Botocore's loader of what AWS's API is: megabytes of JSON, which each session would read again for 0.1 s."""
    from botocore.loaders import create_loader

    return create_loader(data_path)


# -- multipart uploads ------------------------------------------------------------------------------------------------


class UploadPart(NamedTuple):
    """Bytes in memory, or a file. Several threads may read it."""

    data: bytes | Path
    num_bytes: int

    @classmethod
    def of(cls, data: bytes | Path) -> UploadPart:
        return cls(data, len(data) if isinstance(data, bytes) else data.stat().st_size)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        with io.BytesIO(self.data) if isinstance(self.data, bytes) else self.data.open("rb") as f:
            yield f

    def read(self, start: int, num_bytes: int) -> bytes:
        with self.open() as f:
            f.seek(start)
            return f.read(num_bytes)


def _upload_parts(client: Any, target: Mapping[str, str], source: UploadPart) -> Sequence[Mapping[str, Any]]:
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


# -- errors -----------------------------------------------------------------------------------------------------------

_REFUSED = {
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "403",
}
_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "301"}


def _status_of(error: Any) -> int:
    """The HTTP status of a botocore ClientError."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@contextmanager
def _translate_errors(location: S3Location) -> Iterator[None]:
    """Errors of boto3 in the block become StoreError, or UnsupportedError where the server lacks the operation."""
    from boto3.exceptions import RetriesExceededError
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from s3transfer.exceptions import RetriesExceededError as TransferFailed

    try:
        yield
    except ClientError as e:
        raise _of_response(e, location) from e
    except (RetriesExceededError, TransferFailed) as e:
        raise _unreachable(e.last_exception, location) from e
    except ResponseParserError as e:  # an answer that was cut off, or a proxy's
        raise StoreError(f"{_place(location)} gives an answer that is none of S3 ({e}); try again later") from e
    except BotoCoreError as e:
        raise _of_client(e, location) from e


def _of_response(error: Any, location: S3Location) -> LorayError:
    code, message = str(error.response["Error"].get("Code")), str(error.response["Error"].get("Message"))
    place = _place(location)
    if code == "NoSuchBucket":
        return _missing_bucket(location)
    if code in _REFUSED:
        return StoreError(
            f"{place} refuses {error.operation_name} ({code}): check the keys (credentials_file of the store's URL, or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), and that they may list, read, write and delete there"
        )
    if code in _ELSEWHERE:
        return StoreError(f"{place} lies in another region ({message}): add region=… to the store's URL")
    if code == "NotImplemented":
        return UnsupportedError(f"{place} does not implement what {error.operation_name} asks for: {message}")
    return StoreError(f"{place} failed in {error.operation_name}: {code} {message}; try again later")


def _of_client(error: Exception, location: S3Location) -> LorayError:
    from botocore import exceptions

    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return StoreError(
            f"there are no keys for {_place(location)}: name a credentials_file in the store's URL, or set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError):
        return _unreachable(error, location)
    return StoreError(f"{_place(location)} cannot be used: {error}")


def _missing_bucket(location: S3Location) -> StoreError:
    return StoreError(
        f"{_place(location)} does not exist; create the bucket first, for instance: aws s3 mb s3://{location.bucket}"
    )


def _unreachable(error: Exception, location: S3Location) -> StoreError:
    hint = "`loray up` starts a local server again" if location.is_local else "check endpoint_url and the network"
    return StoreError(f"{_place(location)} cannot be reached ({error}); {hint}, then try again")


def _place(location: S3Location) -> str:
    return f"bucket {location.bucket!r} at {endpoint_of(location) or 'AWS'}"


# -- the store --------------------------------------------------------------------------------------------------------


class S3Store:
    """A prefix of a bucket as an ObjectStore. The bucket must exist, and the server must support `If-None-Match`.

    Large objects are sent to AWS in parallel parts, and to other servers in one request: there, two multipart uploads
    that complete at the same moment may both succeed (SeaweedFS 4.48), while of two single writes one is refused.

    Methods raise StoreError where the server cannot be reached or refuses, after several attempts; with `quick` after
    two of 5 s each. Threads may share it; a forked process must make its own.
    """

    def __init__(self, location: S3Location, *, quick: bool = False) -> None:
        self.location = location
        self._client = connect(location, quick=quick)
        self._bucket = location.bucket
        self._prefix = f"{location.prefix}/" if location.prefix else ""
        self._parts_from = _MAX_PUT_BYTES if endpoint_of(location) else LARGE_BYTES
        self._checked: set[str] = set()  # kinds of conditional writes that the server is known to support
        kms = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": location.kms_key_id} if location.kms_key_id else {}
        self._encryption: Mapping[str, str] = kms

    def put_if_absent(self, key: str, data: bytes | Path) -> bool:
        name = self._name(key)
        source = UploadPart.of(data)
        in_parts = source.num_bytes >= self._parts_from
        with _translate_errors(self.location):
            if source.num_bytes >= LARGE_BYTES and self._find(name) is not None:
                return False  # before any byte is sent
            self._check_conditional_writes("PutObject", self._put_whole)
            if in_parts:
                self._check_conditional_writes("CompleteMultipartUpload", self._put_in_parts)
            put = self._put_in_parts if in_parts else self._put_whole
            for attempt in range(_MAX_CONFLICTS):
                won = put(name, source)
                if won is not None:
                    return won
                time.sleep(0.05 * 2**attempt)
        raise StoreError(f"other writers of {key!r} kept being in the way; try again")

    def get(self, key: str) -> bytes:
        buffer = io.BytesIO()
        with self._reading(key):
            self._client.download_fileobj(self._bucket, self._name(key), buffer, Config=_transfer())
        return buffer.getvalue()

    def get_to(self, key: str, path: Path) -> None:
        """Large objects are read in parallel ranges. `path` appears when it is complete."""
        with self._reading(key):
            self._client.download_file(self._bucket, self._name(key), str(path), Config=_transfer())

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        with self._reading(key):
            body = self._open_range(key, start, stop)
            return b"" if body is None else bytes(body.read())

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        with self._reading(key):
            body = self._open_range(key, start, start + len(buffer))
            num_read = 0
            while body is not None and num_read < len(buffer) and (n := body.readinto(buffer[num_read:])):
                num_read += n
            return num_read

    def _open_range(self, key: str, start: int, stop: int) -> Any | None:
        """The response's body; None where the object ends before `start`."""
        from botocore.exceptions import ClientError

        try:
            found = self._client.get_object(Bucket=self._bucket, Key=self._name(key), Range=f"bytes={start}-{stop - 1}")
        except ClientError as e:
            if _status_of(e) == 416:
                return None
            raise
        return found["Body"]

    def exists(self, key: str) -> bool:
        with _translate_errors(self.location):
            found = self._find(self._name(key)) is not None
            if not found:
                self._check_bucket()
            return found

    def size(self, key: str) -> int:
        with self._reading(key):
            return int(self._client.head_object(Bucket=self._bucket, Key=self._name(key))["ContentLength"])

    def list(self, prefix: str = "") -> Iterator[str]:
        yield from sorted(entry.key for entry in self.entries(prefix))

    def entries(self, prefix: str = "") -> Iterator[ObjectEntry]:
        with _translate_errors(self.location):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix):
                for item in page.get("Contents", ()):
                    key = item["Key"].removeprefix(self._prefix)
                    if not key.startswith(f"{TEMPORARY}/") and not key.endswith("/"):
                        yield ObjectEntry(
                            key, int(item["Size"]), item["LastModified"].timestamp(), item.get("ETag", "")
                        )

    def entry(self, key: str) -> ObjectEntry | None:
        """The object as a listing has it; None where there is none."""
        with _translate_errors(self.location):
            found = self._head(self._name(key))
        if found is None:
            return None
        written_at = found["LastModified"].timestamp()
        return ObjectEntry(key, int(found["ContentLength"]), written_at, found.get("ETag", ""))

    def delete(self, key: str) -> None:
        with _translate_errors(self.location):
            self._client.delete_object(Bucket=self._bucket, Key=self._name(key))

    def presigned(self, key: str, expires_s: int) -> str:
        target = {"Bucket": self._bucket, "Key": self._name(key)}
        with _translate_errors(self.location):
            return str(self._client.generate_presigned_url("get_object", Params=target, ExpiresIn=expires_s))

    def check(self) -> None:
        with _translate_errors(self.location):
            self._check_conditional_writes("PutObject", self._put_whole)

    def _put_whole(self, name: str, source: UploadPart) -> bool | None:
        """True where this call has written the object, False where it existed, None where another writer collided."""
        writer = uuid.uuid4().hex
        given = {"Bucket": self._bucket, "Key": name, "Metadata": {"writer": writer}, **self._encryption}
        with source.open() as body:
            put = partial(self._client.put_object, **given, Body=body, IfNoneMatch="*")
            return self._has_written(name, writer, put)

    def _put_in_parts(self, name: str, source: UploadPart) -> bool | None:
        """Write the object in parts, with the result of `_put_whole`; a failed upload leaves none of its parts."""
        writer = uuid.uuid4().hex
        upload = self._client.create_multipart_upload(
            Bucket=self._bucket,
            Key=name,
            ChecksumAlgorithm="CRC32",
            Metadata={"writer": writer},
            **self._encryption,
        )
        target = {"Bucket": self._bucket, "Key": name, "UploadId": upload["UploadId"]}
        won: bool | None = None
        try:
            parts = {"Parts": _upload_parts(self._client, target, source)}
            complete = partial(self._client.complete_multipart_upload, **target, MultipartUpload=parts, IfNoneMatch="*")
            won = self._has_written(name, writer, complete)
        finally:
            if not won:
                self._abort(target)
        return won

    def _abort(self, target: Mapping[str, str]) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._client.abort_multipart_upload(**target)
        except (BotoCoreError, ClientError) as e:  # the caller gets the error that came first
            log.warning("parts of %s stay in bucket %s: %s", target["Key"], self._bucket, e)

    def _has_written(self, name: str, writer: str, request: Callable[[], object]) -> bool | None:
        """Send one conditional request; the result is that of `_put_whole`."""
        from botocore.exceptions import ClientError

        try:
            request()
        except ClientError as e:
            status = _status_of(e)
            if status == 409:
                return None
            if status not in (404, 412) or e.response["Error"].get("Code") == "NoSuchBucket":
                raise
            # The response to a successful attempt may have been lost: then the object has the mark of this writer.
            was_retried = e.response.get("ResponseMetadata", {}).get("RetryAttempts")
            if was_retried and self._find(name) == writer:
                return True
            if status != 412:
                raise
            return False
        return True

    def _check_conditional_writes(self, kind: str, put: Any) -> None:
        """Check once per store and kind of write that the server refuses a second write of a key."""
        if kind in self._checked:
            return
        probe = UploadPart(b"A second write of this key must be refused.\n", 44)
        if put(self._name(_PROBE, reserved=True), probe) and put(self._name(_PROBE, reserved=True), probe):
            raise UnsupportedError(
                f"the server at {endpoint_of(self.location)} ignores If-None-Match in {kind}: two publishers could "
                "overwrite each other there; use a server with conditional writes (AWS S3, MinIO, SeaweedFS, Ceph)"
            )
        self._checked.add(kind)

    @contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        from botocore.exceptions import ClientError

        check_key(key)
        with _translate_errors(self.location):
            try:
                yield
            except ClientError as e:
                if _status_of(e) != 404:
                    raise
                self._check_bucket()
                raise NotFoundError(f"bucket {self._bucket!r} has no object {self._name(key)!r}") from e

    def _find(self, name: str) -> str | None:
        """The mark of the object's writer ("" without one); None where there is no object."""
        found = self._head(name)
        return None if found is None else str(found["Metadata"].get("writer", ""))

    def _head(self, name: str) -> Mapping[str, Any] | None:
        """None where there is no object."""
        from botocore.exceptions import ClientError

        try:
            found: Mapping[str, Any] = self._client.head_object(Bucket=self._bucket, Key=name)
            return found
        except ClientError as e:
            if _status_of(e) != 404:
                raise
            return None

    def _check_bucket(self) -> None:
        """Raise StoreError where the bucket does not exist: HEAD answers alike for a missing key and bucket."""
        from botocore.exceptions import ClientError

        try:
            self._client.head_bucket(Bucket=self._bucket)
        except ClientError as e:
            if _status_of(e) == 404:
                raise _missing_bucket(self.location) from e

    def _name(self, key: str, *, reserved: bool = False) -> str:
        return self._prefix + (key if reserved else check_key(key))


def create_bucket(location: S3Location) -> None:
    """Create the bucket where it does not exist. For local servers: on AWS a bucket needs more than a name."""
    from botocore.exceptions import ClientError

    client = connect(location)
    with _translate_errors(location):
        try:
            client.create_bucket(Bucket=location.bucket)
        except ClientError as e:
            if e.response["Error"].get("Code") not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise


def _transfer() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(
        multipart_threshold=LARGE_BYTES,
        multipart_chunksize=PART_BYTES,
        max_concurrency=NUM_CONNECTIONS,
        preferred_transfer_client="classic",
    )
