"""Stores and pyarrow's filesystems by their URLs."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from loray.locations import FileLocation, S3Location, parse_location
from loray.store.objects import LocalStore, ObjectStore
from loray.store.s3 import S3Store, endpoint_of, read_keys, region_of


def open_filesystem(url: str) -> tuple[Any, str]:
    """(`pyarrow.fs.FileSystem`, the root in it) of a store URL. Buckets are never created.

    Raises SettingsError where the URL or its credentials file is wrong. pyarrow cannot set `kms_key_id`: give the
    bucket a default encryption.
    """
    from pyarrow import fs

    location = parse_location(url)
    if isinstance(location, FileLocation):
        return fs.LocalFileSystem(), str(location.folder)
    root = f"{location.bucket}/{location.prefix}".rstrip("/")
    return fs.S3FileSystem(**_s3_arguments(location)), root


def _s3_arguments(location: S3Location) -> dict[str, Any]:
    arguments: dict[str, Any] = {"allow_bucket_creation": False, "region": region_of(location)}
    endpoint = endpoint_of(location)  # pyarrow does not read AWS's variables for it
    if endpoint:
        parts = urlsplit(endpoint)
        arguments |= {"scheme": parts.scheme, "endpoint_override": parts.netloc}
    if location.credentials_file is not None:
        keys = read_keys(location.credentials_file)
        arguments |= {"access_key": keys.access_key, "secret_key": keys.secret_key, "session_token": keys.session_token}
    return arguments


def open_store(url: str) -> ObjectStore:
    """The store at `file:///absolute/folder` (created at the first write) or `s3://bucket/prefix?…`.

    Raises SettingsError where the URL or its credentials file is wrong. Connects at the first request.
    """
    location = parse_location(url)
    if isinstance(location, FileLocation):
        return LocalStore(location.folder)
    return S3Store(location)
