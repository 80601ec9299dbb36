"""The store of one LORAY_HOME: a folder in it, or a bucket of its own local S3 server.

The file `HOME/s3/store_url` makes the bucket the home's default store; `Settings.from_env` reads it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from loray.errors import SettingsError
from loray.files import write_private
from loray.local.s3 import LocalS3, current_local_s3, start_local_s3, stop_local_s3
from loray.locations import S3Location, parse_location
from loray.settings import LOCAL_S3_FOLDER, STORE_URL_FILE, Settings
from loray.store import LocalStore, ObjectStore, open_store
from loray.store.s3 import create_bucket

_BUCKET = "loray"


def has_local_s3(settings: Settings) -> bool:
    """Whether the store is the bucket of this home's own server."""
    return not os.environ.get("LORAY_STORE") and _url_file(settings).is_file()


def move_to_local_s3(settings: Settings) -> Settings:
    """Starts this home's S3 server, copies the folder store into its bucket, and makes the bucket the home's store.

    A second call copies objects that were added to the folder since. Nothing is removed from the folder. SettingsError
    if LORAY_STORE or LORAY_ADDRESS is set.
    """
    for name, role in (("LORAY_STORE", "names the store"), ("LORAY_ADDRESS", "names a cluster of your own")):
        if os.environ.get(name):
            raise SettingsError(
                f"{name}={os.environ[name]} {role}, and --s3 starts a server for this machine's own cluster and store: "
                f"leave out --s3, or unset {name}"
            )
    server = start_local_s3(_folder(settings))
    create_bucket(server.location(_BUCKET))
    settings = _settled(settings, server, write=False)
    folder, bucket = LocalStore(settings.home / "store"), open_store(settings.store)
    copy_objects(folder, bucket)
    _settled(settings, server, write=True)
    copy_objects(folder, bucket)  # adapters published meanwhile
    return settings


def start_home_store(settings: Settings) -> Settings:
    """Starts the S3 server of this home's store, if it has one. The store's URL may change."""
    if not has_local_s3(settings):
        return settings
    return _settled(settings, start_local_s3(_folder(settings)), write=True)


def stop_home_store(settings: Settings) -> bool:
    """Stops this home's S3 server and keeps its data. False if none was running."""
    return stop_local_s3(_folder(settings))


def describe_store(settings: Settings) -> str:
    """The store's URL without its options, with a remark if this home's server does not run."""
    location = parse_location(settings.store)
    if not isinstance(location, S3Location):
        return settings.store
    place = replace(location, endpoint_url=None, region=None, credentials_file=None, kms_key_id=None).url
    if location.endpoint_url:
        place += f" at {location.endpoint_url}"
    if has_local_s3(settings) and current_local_s3(_folder(settings)) is None:
        place += " (its server is down; `loray up` starts it)"
    return place


def copy_objects(source: LocalStore, target: ObjectStore) -> int:
    """Copies objects in the order of keys, so an adapter's manifest after its blobs. Returns how many were new."""
    return sum(target.put_if_absent(key, source.root / key) for key in source.list())


def _settled(settings: Settings, server: LocalS3, *, write: bool) -> Settings:
    url = server.location(_BUCKET).url
    if write and (not _url_file(settings).is_file() or _url_file(settings).read_text(encoding="utf-8").strip() != url):
        write_private(_url_file(settings), url + "\n")
    return replace(settings, store=url)


def _folder(settings: Settings) -> Path:
    return settings.home / LOCAL_S3_FOLDER


def _url_file(settings: Settings) -> Path:
    return _folder(settings) / STORE_URL_FILE
