"""Data files in buckets: the driver downloads them, reads them, and removes its copies."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pyarrow import fs as pafs

from loray.errors import DataError, SettingsError
from loray.locations import S3Location, parse_location
from loray.settings import Settings
from loray.spec import DataSpec
from loray.store import open_filesystem


@contextmanager
def fetched(data: DataSpec, settings: Settings) -> Iterator[Mapping[str, Path]]:
    """Maps each s3:// source of `data` to a copy on this machine, which is removed when the block ends.

    A URL in the store's bucket is read with the store's endpoint and credentials. Any other URL is read with the
    options that it names, as a store's URL does, or else with the AWS configuration. Raises DataError.
    """
    with tempfile.TemporaryDirectory(prefix="loray-data-") as folder:
        copies: dict[str, Path] = {}
        for source in (data.train, data.eval):
            if source is not None and source.startswith("s3://") and source not in copies:
                copies[source] = Path(folder, str(len(copies)))
                _fetch(source, settings, copies[source])
        yield copies


def _fetch(source: str, settings: Settings, path: Path) -> None:
    try:
        files, key = open_filesystem(_with_options(source, settings))
        kind = files.get_file_info(key).type
        if kind == pafs.FileType.NotFound:
            raise DataError(f"data file {source} does not exist")
        if kind == pafs.FileType.Directory:
            raise DataError(f"{source} is a folder; name one JSONL or Parquet file")
        with files.open_input_stream(key) as remote, path.open("wb") as file:
            shutil.copyfileobj(remote, file, 1 << 20)
    except (SettingsError, OSError) as e:
        raise DataError(f"cannot read data file {source}: {e}") from e


def _with_options(source: str, settings: Settings) -> str:
    """Adds the store's endpoint and credentials to a URL without options that lies in the store's bucket."""
    location, store = parse_location(source), parse_location(settings.store)
    assert isinstance(location, S3Location)
    if isinstance(store, S3Location) and location == S3Location(store.bucket, location.prefix):
        return replace(store, prefix=location.prefix).url
    return source
