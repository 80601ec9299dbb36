"""A store's place as a pyarrow filesystem."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from loray.store import LocalStore, open_filesystem
from loray.store.s3 import S3Store


def test_a_folder_as_a_filesystem(tmp_path: Path) -> None:
    filesystem, root = open_filesystem(f"file://{tmp_path}")
    LocalStore(tmp_path).put_if_absent("a", b"one")
    with filesystem.open_input_file(f"{root}/a") as f:
        assert f.read() == b"one"


def test_a_bucket_as_a_filesystem(s3_objects: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    location = s3_objects.location
    filesystem, root = open_filesystem(location.url)
    assert root == f"{location.bucket}/{location.prefix}"
    s3_objects.put_if_absent("a", b"one")
    with filesystem.open_input_file(f"{root}/a") as f:
        assert f.read() == b"one"
    with filesystem.open_output_stream(f"{root}/b") as f:
        f.write(b"two")
    assert s3_objects.get("b") == b"two"
    with pytest.raises(OSError, match="nobody-made-this"):
        filesystem.create_dir("nobody-made-this/x")

    keys = (location.credentials_file or Path()).read_text().split()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys[3])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys[6])
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", location.endpoint_url or "")
    of_environment, root = open_filesystem(replace(location, endpoint_url=None, credentials_file=None, region=None).url)
    with of_environment.open_input_file(f"{root}/b") as f:
        assert f.read() == b"two"
