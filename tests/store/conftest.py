"""Object stores of both kinds, and adapters to put into them."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from loray.adapters.manifest import ManifestDetails, describe
from loray.bases.registry import BaseModel
from loray.locations import S3Location, parse_location
from loray.store import AdapterStore, LocalStore, ObjectStore
from loray.store.s3 import S3Store
from tests.fixtures.s3 import S3Server


@pytest.fixture(params=["folder", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """The same tests for every kind of store."""
    kind = "local_objects" if request.param == "folder" else "s3_objects"
    store: ObjectStore = request.getfixturevalue(kind)
    return store


@pytest.fixture
def local_objects(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture(scope="session")
def s3_bucket(s3_server: S3Server) -> S3Location:
    location = parse_location(s3_server.url("store"))
    assert isinstance(location, S3Location)
    return location


@pytest.fixture
def s3_location(s3_bucket: S3Location) -> S3Location:
    """A prefix of its own for each test, in a bucket that they share."""
    return replace(s3_bucket, prefix=f"tests/{uuid.uuid4().hex}")


@pytest.fixture
def s3_objects(s3_location: S3Location) -> S3Store:
    return S3Store(s3_location)


@pytest.fixture
def store(objects: ObjectStore) -> AdapterStore:
    return AdapterStore(objects)


@pytest.fixture
def describe_one(tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path]) -> Callable[[int], Path]:
    """`describe_one(seed)`: a small adapter's folder with its manifest, new at each call."""

    def make(seed: int = 0) -> Path:
        base = tiny_base()
        folder = peft_folder(base, "lora", seed)
        describe(folder, base, ManifestDetails(description=f"number {seed}"))
        return folder

    return make


def damage(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(damaged(path.read_bytes()))


def damage_object(objects: ObjectStore, key: str) -> None:
    """Another byte at its end, and nobody told."""
    if isinstance(objects, LocalStore):
        damage(objects.root / key)
    else:
        assert isinstance(objects, S3Store)
        name = f"{objects.location.prefix}/{key}"
        objects._client.put_object(Bucket=objects.location.bucket, Key=name, Body=damaged(objects.get(key)))


def damaged(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])
