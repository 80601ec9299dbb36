"""Training data of buckets, of the Hugging Face hub and of `/v1/files`, copied to this machine."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from loray.catalog import Catalog
from loray.errors import CatalogError, DataError, IntegrityError, NotFoundError, StoreError, UnsupportedError
from loray.locations import S3Location, parse_location
from loray.publishing.user_files import read_file
from loray.recipes.sources import HUB, UPLOADED, Copy, RemoteFile, fixed_part, is_glob, is_read, matches
from loray.settings import Settings
from loray.spec import ColumnNames
from loray.store import open_store
from loray.store.objects import ObjectEntry
from loray.store.s3 import S3Store

_INSTEAD = "save the data set elsewhere with its save_to_disk, and name that folder"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_SOURCE = re.compile(
    rf"hf://(?P<id>{_NAME}/{_NAME})(/(?P<config>{_NAME}))?(@(?P<revision>[A-Za-z0-9._-]+))?(:(?P<split>[^/@]+))?"
)


class HubSource(NamedTuple):
    """`split` is as `datasets` writes them: `train`, `train[:10%]`, `train+validation`."""

    id: str
    config: str | None
    revision: str | None
    split: str


def parse_hub(source: str) -> HubSource:
    """Reads hf://org/name, with /CONFIGURATION, @REVISION or :SPLIT after it. Raises DataError for anything else."""
    found = _SOURCE.fullmatch(source)
    if found is None:
        raise DataError(
            f"{source} names no data set of the Hugging Face hub: write hf://org/name, and /CONFIGURATION, @REVISION "
            "or :SPLIT after it where they are not the default ones"
        )
    return HubSource(found["id"], found["config"], found["revision"], found["split"] or "train")


def _fetch_hub(source: str, copy: Path, columns: ColumnNames | None) -> None:
    """Saves the columns that training reads in the folder `copy`. Raises DataError that says what to do."""
    wanted = parse_hub(source)
    try:
        import datasets
    except ImportError as e:
        raise DataError(
            f"{source} needs the package datasets, which is not installed here: pip install "
            f"'loray[datasets]', or {_INSTEAD}"
        ) from e
    try:
        found: Any = datasets.load_dataset(wanted.id, wanted.config, split=wanted.split, revision=wanted.revision)
        ours = ColumnNames.model_fields
        read = {*ours, *(() if columns is None else map(columns.of, ours))}
        if wanted_columns := [column for column in found.column_names if column in read]:
            found = found.select_columns(wanted_columns)
        found.save_to_disk(str(copy))
    except Exception as e:  # datasets raises any error, of whatever it meets at the hub
        reason = str(e).strip().splitlines()[0].rstrip(".") if str(e).strip() else type(e).__name__
        raise DataError(
            f"{source} cannot be loaded: {reason}. Check the name, the network and HF_TOKEN; without a network, "
            f"{_INSTEAD}"
        ) from e


@contextmanager
def fetched(
    paths: Sequence[str], settings: Settings, columns: ColumnNames | None = None
) -> Iterator[Mapping[str, Copy]]:
    """Maps each s3://, hf:// and files:// source of `paths` to a copy on this machine, which is removed when the block
    ends. Of a bucket's objects only the state is asked for; one is fetched when it is read, as an uploaded file is.
    `columns`: other names of the columns that are read.

    A URL without options below LORAY_DATA is read with that URL's options, one in the store's bucket with the store's.
    Any other URL is read with the options that it names, as a store's URL does, or else with the AWS configuration.
    Raises DataError, which does not show the options of this deployment: who reads the job's log need not know them.
    """
    with tempfile.TemporaryDirectory(prefix="loray-data-") as folder:
        copies: dict[str, Copy] = {}
        for source in paths:
            if source in copies or not source.startswith(("s3://", HUB, UPLOADED)):
                continue
            path = Path(folder, str(len(copies)))
            if source.startswith(HUB):
                _fetch_hub(source, path, columns)
                copies[source] = Copy(path)
            elif source.startswith(UPLOADED):
                copies[source] = _uploaded(source, settings, path)
            else:
                copies[source] = _in_bucket(source, settings, path)
        yield copies


def _uploaded(source: str, settings: Settings, copy: Path) -> Copy:
    """Makes a file that is empty until it is read. Whose it is was checked when the job was submitted."""
    try:
        catalog = Catalog.of(settings)
        try:
            file = catalog.files.stored(source.removeprefix(UPLOADED))
        finally:
            catalog.close()
    except (CatalogError, NotFoundError) as e:
        raise DataError(f"cannot read data file {source}: {e}") from e

    def read(path: Path) -> None:
        try:
            with path.open("wb") as f:
                f.writelines(read_file(open_store(settings.store), file))
        except (StoreError, IntegrityError, OSError) as e:
            raise DataError(f"cannot read data file {source}: {e}") from e

    copy.touch()
    return Copy(copy, {copy: RemoteFile(copy, (source, file.sha256), read)})


def _in_bucket(source: str, settings: Settings, copy: Path) -> Copy:
    """Makes a file, or a folder of files, empty until they are read."""
    with _data_errors(source, None):
        location = _location(source, settings)
    with _data_errors(source, location):
        store = S3Store(replace(location, prefix=""))
        objects = _objects(source, store, location.prefix)
        remote = {}
        for relative, entry in objects.items():
            path = copy / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            # With the options: who may list an object with other keys than before has to read it with them.
            state = replace(location, prefix=entry.key).url, entry.num_bytes, int(entry.written_at), entry.etag
            remote[path] = RemoteFile(path, state, partial(_fetch_object, source, store, location, entry))
        if copy not in remote:
            copy.mkdir(exist_ok=True)  # what is no data is not fetched: maybe nothing is
        return Copy(copy, remote)


def _objects(source: str, store: S3Store, key: str) -> dict[str, ObjectEntry]:
    """Returns the objects by their path below the source; the path of a single one is empty."""
    folder = fixed_part(key).rstrip("/")
    single = store.entry(folder) if folder and not is_glob(key) else None
    if single is not None:
        return {"": single}
    prefix = f"{folder}/" if folder else ""
    found, is_empty = {}, True
    for entry in store.entries(prefix):
        is_empty, relative = False, entry.key.removeprefix(prefix)
        if relative != str(PurePosixPath(relative)) or relative.startswith("/"):
            continue  # no path of a file
        if matches(relative, key.removeprefix(prefix)) if is_glob(key) else is_read(relative):
            found[relative] = entry
    if is_empty:
        raise DataError(f"data file {source} does not exist")
    return found


def _fetch_object(source: str, store: S3Store, location: S3Location, entry: ObjectEntry, path: Path) -> None:
    """Copies an object. Raises DataError also where it is not that of `entry` any more."""
    with _data_errors(source, location):
        store.get_to(entry.key, path)
        now = store.entry(entry.key)
        if now is None or now.etag != entry.etag or path.stat().st_size != entry.num_bytes:
            raise DataError(f"{source} was changed while it was read; start again")


@contextmanager
def _data_errors(source: str, location: S3Location | None) -> Iterator[None]:
    try:
        yield
    except (ValueError, StoreError, NotFoundError, UnsupportedError, OSError) as e:
        reason = str(e) if location is None or location.url == source else _without_options(str(e), location)
        raise DataError(f"cannot read data file {source}: {reason}") from None


def _location(source: str, settings: Settings) -> S3Location:
    """Returns where `source` is, with the options of LORAY_DATA or of the store where it has none and lies there."""
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
    """Returns an error's text in which the options are called by their names."""
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
