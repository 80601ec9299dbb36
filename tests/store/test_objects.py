"""What every object store promises: written once, whole or not at all, one winner; and its place as a filesystem."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from loray.errors import NotFoundError
from loray.store import LocalStore, ObjectStore, open_filesystem
from loray.store.s3 import S3Store
from tests.fixtures.calls import at_once, refused


def test_objects(objects: ObjectStore, tmp_path: Path) -> None:
    assert list(objects.list()) == []
    assert objects.put_if_absent("a/b", b"one")
    assert not objects.put_if_absent("a/b", b"two")
    (tmp_path / "file").write_bytes(b"three")
    assert objects.put_if_absent("a/c", tmp_path / "file")
    assert objects.put_if_absent("empty", b"")
    assert (objects.get("a/b"), objects.get("a/c"), objects.get("empty")) == (b"one", b"three", b"")
    for key, data in (("a/b", b"one"), ("empty", b"")):
        objects.get_to(key, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == data
    objects.delete("a/b")
    objects.delete("a/b")
    assert not objects.exists("a/b")
    assert objects.exists("a/c")


def test_what_is_missing(objects: ObjectStore, tmp_path: Path) -> None:
    objects.put_if_absent("a/b/c", b"")
    for key in ("a/b", "a/b/c/d", "x"):
        assert not objects.exists(key)
        refused(NotFoundError, key, objects.get, key)
        refused(NotFoundError, key, objects.get_to, key, tmp_path / "out")
    assert list(tmp_path.glob("out*")) == []


def test_ranges(objects: ObjectStore) -> None:
    objects.put_if_absent("a", b"0123456789")
    ranges = [(0, 3), (3, 10), (8, 100), (10, 11), (50, 60)]
    assert [objects.get_range("a", *r) for r in ranges] == [b"012", b"3456789", b"89", b"", b""]
    refused(NotFoundError, "no object", objects.get_range, "b", 0, 1)


def test_lists_are_sorted_and_by_prefix(objects: ObjectStore) -> None:
    keys = ["a-b", "a.c", "a/b", "a/b2", "a/c/d", "ab", "ä", "z"]
    for key in reversed(keys):
        assert objects.put_if_absent(key, b"")
    assert list(objects.list()) == sorted(keys)
    assert list(objects.list("a/")) == ["a/b", "a/b2", "a/c/d"]
    assert list(objects.list("a/b")) == ["a/b", "a/b2"]
    assert list(objects.list("none")) == []


def test_a_check_leaves_nothing_to_see(objects: ObjectStore) -> None:
    objects.check()
    objects.check()
    assert list(objects.list()) == []


@pytest.mark.parametrize("key", ["", "/a", "a/../b", "..", "a/", "a//b", ".tmp/x"])
def test_keys_stay_inside(objects: ObjectStore, key: str, tmp_path: Path) -> None:
    for use in (
        lambda: objects.put_if_absent(key, b""),
        lambda: objects.get(key),
        lambda: objects.get_to(key, tmp_path / "x"),
        lambda: objects.exists(key),
        lambda: objects.delete(key),
    ):
        refused(ValueError, "not a valid key", use)


def test_one_writer_wins(objects: ObjectStore) -> None:
    wins = at_once(8, lambda i: objects.put_if_absent("key", bytes([i]) * 100_000))
    assert wins.count(True) == 1
    assert objects.get("key") == bytes([wins.index(True)]) * 100_000
    assert list(objects.list()) == ["key"]


def test_a_folder_keeps_nothing_half_written(local_objects: LocalStore, tmp_path: Path) -> None:
    local_objects.put_if_absent("a", b"x")
    refused(FileNotFoundError, "", local_objects.put_if_absent, "b", tmp_path / "no-such-file")
    assert list((local_objects.root / ".tmp").iterdir()) == []
    assert list(local_objects.list()) == ["a"]


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
    refused(OSError, "nobody-made-this", filesystem.create_dir, "nobody-made-this/x")

    keys = (location.credentials_file or Path()).read_text().split()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys[3])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys[6])
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", location.endpoint_url or "")
    of_environment, root = open_filesystem(replace(location, endpoint_url=None, credentials_file=None, region=None).url)
    with of_environment.open_input_file(f"{root}/b") as f:
        assert f.read() == b"two"
