"""Data elsewhere: the driver downloads files, folders and globs of buckets, and data sets of the Hugging Face hub,
reads its copies, and removes them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pyarrow import fs as pafs

from jobs.driver import hub
from loray.errors import DataError, SettingsError
from loray.locations import S3Location, parse_location
from loray.recipes.sources import HUB, fixed_part, is_glob, is_read, matches
from loray.settings import Settings
from loray.store import open_filesystem


@contextmanager
def fetched(paths: Sequence[str], settings: Settings) -> Iterator[Mapping[str, Path]]:
    """Maps each s3:// and hf:// source of `paths` to a copy on this machine, a file or a folder, which is removed when
    the block ends.

    A URL without options below LORAY_DATA is read with that URL's options, one in the store's bucket with the store's.
    Any other URL is read with the options that it names, as a store's URL does, or else with the AWS configuration.
    Raises DataError, which does not show the options of this deployment: who reads the job's log need not know them.
    """
    with tempfile.TemporaryDirectory(prefix="loray-data-") as folder:
        copies: dict[str, Path] = {}
        for source in paths:
            if source in copies or not source.startswith(("s3://", HUB)):
                continue
            copies[source] = Path(folder, str(len(copies)))
            if source.startswith(HUB):
                hub.fetch(source, copies[source])
            else:
                _fetch(source, settings, copies[source])
        yield copies


def _fetch(source: str, settings: Settings, copy: Path) -> None:
    location: S3Location | None = None
    try:
        location = _location(source, settings)
        files, key = open_filesystem(location.url)
        folder = fixed_part(key).rstrip("/")
        kind = files.get_file_info(folder).type
        if kind == pafs.FileType.NotFound:
            raise DataError(f"data file {source} does not exist")
        if kind == pafs.FileType.File:
            _copy(files, key, copy)
            return
        for found in files.get_file_info(pafs.FileSelector(folder, recursive=True)):
            relative = found.path.removeprefix(f"{folder}/")
            wanted = matches(relative, key.removeprefix(f"{folder}/")) if is_glob(key) else is_read(relative)
            if found.type == pafs.FileType.File and wanted:
                _copy(files, found.path, copy / relative)
        copy.mkdir(exist_ok=True)  # what is no data is not fetched: maybe nothing is
    except (SettingsError, OSError) as e:
        reason = str(e) if location is None or location.url == source else _without_options(str(e), location)
        raise DataError(f"cannot read data file {source}: {reason}") from None


def _copy(files: Any, key: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.open_input_stream(key) as remote, path.open("wb") as file:
        shutil.copyfileobj(remote, file, 1 << 20)


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
