"""Training data in buckets: with whose options a URL is opened, and what errors say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.driver.data import _location, _without_options, fetched
from loray.errors import DataError
from loray.locations import S3Location, parse_location
from loray.settings import Settings
from loray.store.s3 import S3Store
from tests.s3 import S3Server

OPTIONS = "endpoint_url=http://minio:9000&region=eu-1&credentials_file=/etc/keys"


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("s3://training/sets/acme/a.jsonl", OPTIONS),
        ("s3://training/sets2/acme/a.jsonl", ""),
        ("s3://training/sets", ""),
        ("s3://training/sets/a.jsonl?region=eu-2", "region=eu-2"),
        ("s3://adapters/a.jsonl", "endpoint_url=http://store:1"),
        ("s3://elsewhere/a.jsonl", ""),
    ],
)
def test_options_are_those_of_the_place(tmp_path: Path, source: str, options: str) -> None:
    env = {"LORAY_HOME": str(tmp_path), "LORAY_STORE": "s3://adapters/x?endpoint_url=http://store:1"}
    settings = Settings.from_env(env | {"LORAY_DATA": f"s3://training/sets?{OPTIONS}"})
    assert _location(source, settings).url == source.partition("?")[0] + (f"?{options}" if options else "")


def test_a_tenants_data_is_fetched_with_the_options_of_the_deployment(s3_server: S3Server, tmp_path: Path) -> None:
    url = s3_server.url("training", "sets")
    source = f"{url.partition('?')[0]}/acme/a.jsonl"
    S3Store(s3_of(url)).put_if_absent("acme/a.jsonl", b"{}")
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path), "LORAY_DATA": url})
    with fetched([source], settings) as copies:
        assert copies[source].read_bytes() == b"{}"
    other = [source.replace("a.jsonl", "b.jsonl")]
    with pytest.raises(DataError, match=r"b\.jsonl does not exist$"), fetched(other, settings):
        pass
    wrong = replace(s3_of(url), credentials_file=tmp_path / "zq-keys").url
    with (
        pytest.raises(DataError, match=rf"data file {source}: .*\(credentials_file\) cannot be read") as error,
        fetched([source], replace(settings, data=wrong)),
    ):
        pass
    assert "zq-keys" not in str(error.value)


def test_an_error_calls_options_by_their_names() -> None:
    location = s3_of(f"s3://training/sets?{OPTIONS}&kms_key_id=k-77")
    shown = _without_options("no route to http://minio:9000 or minio with /etc/keys and k-77", location)
    assert shown == "no route to (endpoint_url) or (the endpoint's host) with (credentials_file) and (kms_key_id)"


def s3_of(url: str) -> S3Location:
    location = parse_location(url)
    assert isinstance(location, S3Location)
    return location
