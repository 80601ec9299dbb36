"""Data files in buckets: the driver downloads them, reads them, and removes its copies."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs as pafs

from loray.errors import DataError, SettingsError
from loray.locations import S3Location, parse_location
from loray.settings import Settings
from loray.spec import DataSpec
from loray.store import open_filesystem


@contextmanager
def fetched(data: DataSpec, settings: Settings) -> Iterator[Mapping[str, Path]]:
    """Maps each s3:// source of `data` to a copy on this machine, which is removed when the block ends.

    A URL without options below LORAY_DATA is read with that URL's options, one in the store's bucket with the store's.
    Any other URL is read with the options that it names, as a store's URL does, or else with the AWS configuration.
    Raises DataError, which does not show the options of this deployment: who reads the job's log need not know them.
    """
    with tempfile.TemporaryDirectory(prefix="loray-data-") as folder:
        copies: dict[str, Path] = {}
        for source in (data.train, data.eval):
            if source is not None and source.startswith("s3://") and source not in copies:
                copies[source] = Path(folder, str(len(copies)))
                _fetch(source, settings, copies[source])
        yield copies


def _fetch(source: str, settings: Settings, path: Path) -> None:
    location: S3Location | None = None
    try:
        location = _location(source, settings)
        files, key = open_filesystem(location.url)
        kind = files.get_file_info(key).type
        if kind == pafs.FileType.NotFound:
            raise DataError(f"data file {source} does not exist")
        if kind == pafs.FileType.Directory:
            raise DataError(f"{source} is a folder; name one JSONL or Parquet file")
        with files.open_input_stream(key) as remote, path.open("wb") as file:
            shutil.copyfileobj(remote, file, 1 << 20)
    except (SettingsError, OSError) as e:
        reason = str(e) if location is None or location.url == source else _without_options(str(e), location)
        raise DataError(f"cannot read data file {source}: {reason}") from None


def _location(source: str, settings: Settings) -> S3Location:
    """Where `source` is, with the options of LORAY_DATA or of the store where it has none and lies there."""
    location = parse_location(source)
    assert isinstance(location, S3Location)
    if location != S3Location(location.bucket, location.prefix):
        return location
    data, store = (None if url is None else parse_location(url) for url in (settings.data, settings.store))
    if isinstance(data, S3Location) and source.startswith(f"{S3Location(data.bucket, data.prefix).url}/"):
        return replace(data, prefix=location.prefix)
    if isinstance(store, S3Location) and store.bucket == location.bucket:
        return replace(store, prefix=location.prefix)
    return location


def _without_options(reason: str, location: S3Location) -> str:
    """An error's text in which the options are called by their names."""
    endpoint = urlsplit(location.endpoint_url or "")
    values = {
        "credentials_file": str(location.credentials_file or ""),
        "kms_key_id": location.kms_key_id or "",
        "endpoint_url": location.endpoint_url or "",
        "the endpoint": endpoint.netloc,
        "the endpoint's host": endpoint.hostname or "",
    }
    for name, value in values.items():
        reason = reason.replace(value, f"({name})") if value else reason
    return reason
