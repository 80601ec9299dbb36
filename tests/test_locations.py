"""Store URLs: what is accepted, what is refused with a reason, and the same place as a pyarrow filesystem."""

from __future__ import annotations

from pathlib import Path

import pytest

from loray.errors import SettingsError
from loray.locations import FileLocation, S3Location, parse_location
from loray.settings import Settings
from loray.store import open_store
from tests.fixtures.calls import refused


def test_urls(tmp_path: Path) -> None:
    assert parse_location(f"file://{tmp_path}") == FileLocation(tmp_path)
    assert parse_location("s3://bucket") == parse_location("s3://bucket/") == S3Location("bucket")
    url = (
        "s3://my.bucket/some/prefix?endpoint_url=http://127.0.0.1:9000&region=eu-west-1"
        "&credentials_file=/etc/keys&kms_key_id=arn:aws:kms:eu-west-1:1:key/2"
    )
    location = parse_location(url)
    assert location == S3Location(
        "my.bucket",
        "some/prefix",
        "http://127.0.0.1:9000",
        "eu-west-1",
        Path("/etc/keys"),
        "arn:aws:kms:eu-west-1:1:key/2",
    )
    assert parse_location(location.url) == location
    odd = S3Location("bucket", credentials_file=Path("/a b&c/#d"))
    assert parse_location(odd.url) == odd


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file://relative", "absolute folder"),
        ("ftp://x", "must start with file:// or s3://"),
        ("/plain", "must start with file:// or s3://"),
        ("s3://", "not a bucket's name"),
        ("s3://Ab/c", "not a bucket's name"),
        ("s3://key:secret@bucket", "holds no keys"),
        ("s3://bucket/a//b", "without"),
        ("s3://bucket/../b", "without"),
        ("s3://bucket/a#b", "without"),
        ("s3://bucket?regoin=x", "unknown option regoin; known are endpoint_url, region"),
        ("s3://bucket?region", "name=value"),
        ("s3://bucket?region=", "once, with a value"),
        ("s3://bucket?region=a&region=b", "once, with a value"),
        ("s3://bucket?region=Europe", "not a region"),
        ("s3://bucket?endpoint_url=127.0.0.1:9000", "http://host:port"),
        ("s3://bucket?endpoint_url=http://host:port", "http://host:port"),
        ("s3://bucket?endpoint_url=http://host/path", "http://host:port"),
        ("s3://bucket?credentials_file=keys", "absolute path"),
    ],
)
def test_wrong_urls(url: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason) as error:
        open_store(url)
    assert "secret" not in str(error.value)
    refused(SettingsError, "LORAY_STORE: ", Settings.from_env, {"LORAY_STORE": url})


def test_what_other_machines_reach(tmp_path: Path) -> None:
    catalog = "postgresql://db.example/catalog"
    for store, is_local in (
        ("s3://bucket", False),
        ("s3://bucket?endpoint_url=https://s3.example", False),
        ("s3://bucket?endpoint_url=http://127.0.0.1:9000", True),
        ("s3://bucket?endpoint_url=http://localhost:9000", True),
        ("s3://bucket?endpoint_url=http://[::1]:9000", True),
        (f"file://{tmp_path}", True),
    ):
        assert Settings.from_env({"LORAY_STORE": store, "LORAY_CATALOG": catalog}).is_local is is_local
    assert Settings.from_env({"LORAY_STORE": "s3://bucket"}).is_local  # its catalog is a file here
    for catalog, is_local in (
        ("postgresql:///loray", True),  # behind a socket
        ("postgresql://loray@/loray?host=/var/run/postgresql", True),
        ("postgresql+psycopg://localhost:5432/loray", True),
        ("postgresql:///loray?host=127.0.0.1", True),
        ("postgresql:///loray?host=db.example", False),
        ("postgresql:///loray?host=127.0.0.1,db.example", False),
    ):
        env = {"LORAY_STORE": "s3://bucket", "LORAY_CATALOG": catalog}
        assert Settings.from_env(env).is_local is is_local, catalog


@pytest.mark.parametrize("url", ["postgres://loray:hush@db/loray", "loray:hush@db/loray", "mysql://hush"])
def test_a_wrong_catalog_is_told_without_its_password(url: str) -> None:
    with pytest.raises(SettingsError, match=r"LORAY_CATALOG .* must be a sqlite:/// or postgresql:// URL") as error:
        Settings.from_env({"LORAY_CATALOG": url})
    assert "hush" not in str(error.value)


def test_limits_of_a_server_are_numbers_sizes_or_none() -> None:
    settings = Settings.from_env({})
    assert (settings.max_jobs, settings.max_workers, settings.scratch_bytes) == (4, 16, None)
    given = {"LORAY_MAX_JOBS": "none", "LORAY_MAX_WORKERS": "0", "LORAY_SCRATCH_BYTES": "20GiB"}
    settings = Settings.from_env(given)
    assert (settings.max_jobs, settings.max_workers, settings.scratch_bytes) == (None, 0, 20 << 30)
    told = settings.to_env()
    assert Settings.from_env({name: told[name] for name in given}) == settings
    assert not Settings.from_env({}).to_env().keys() & given.keys()
    for name in given:
        refused(SettingsError, name, Settings.from_env, {name: "many"})
