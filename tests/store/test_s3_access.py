"""Reaching an S3 bucket: prefixes, encryption, keys, and servers that are down or wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from loray.errors import SettingsError, StoreError
from loray.locations import S3Location
from loray.store import open_store
from loray.store.s3 import S3Store, UploadPart
from tests.fixtures.cluster import free_port
from tests.store.test_s3 import Requests, answer


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
        with pytest.raises(ClientError, match="NoKms"):
            put("x", UploadPart(b"x", 1))
    for headers in requests.headers:
        assert headers["x-amz-server-side-encryption"] == "aws:kms"
        assert headers["x-amz-server-side-encryption-aws-kms-key-id"] == "key-1"
    assert len(requests.headers) == 2


def test_wrong_keys(s3_location: S3Location, tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = LORAY1\naws_secret_access_key = wrong\n")
    store = S3Store(replace(s3_location, credentials_file=file))
    for use in (store.check, lambda: store.get("x"), lambda: store.exists("x"), lambda: list(store.list())):
        with pytest.raises(StoreError, match="check the keys"):
            use()


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
        with pytest.raises(StoreError, match="aws s3 mb s3://nobody-made-this"):
            use()


def test_a_server_that_is_down(s3_location: S3Location) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    store = S3Store(replace(s3_location, endpoint_url=endpoint))
    with pytest.raises(StoreError, match=f"{endpoint} cannot be reached.*`loray up`"):
        store.get("x")
    elsewhere = S3Store(replace(s3_location, endpoint_url="http://no-such-host.invalid"))
    elsewhere._client.meta.events.register("needs-retry.s3", lambda **_: None)
    with pytest.raises(StoreError, match=r"no-such-host\.invalid cannot be reached.*check endpoint_url"):
        elsewhere.get("x")


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
    with pytest.raises(StoreError, match="there are no keys"):
        open_store(bare.url).check()
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(s3_location.credentials_file))
    open_store(bare.url).check()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_location.endpoint_url or "")
    open_store(replace(bare, endpoint_url=None, region=None).url).check()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-something-else")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-something-else")
    open_store(s3_location.url).check()  # the file that the URL names goes first


def test_a_wrong_credentials_file(s3_location: S3Location, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        S3Store(replace(s3_location, credentials_file=tmp_path / "none"))
    (tmp_path / "empty").write_text("[other]\n")
    with pytest.raises(SettingsError, match=r"needs a section \[default\]"):
        S3Store(replace(s3_location, credentials_file=tmp_path / "empty"))
