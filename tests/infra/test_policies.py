"""The bucket's policies allow what each role does against a real server, and nothing that it does not do."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from loray.adapters.manifest import describe
from loray.bases.registry import BaseModel
from loray.errors import NotFoundError
from loray.locations import S3Location, parse_location
from loray.publishing.uploads import Uploads
from loray.store import AdapterStore
from loray.store.s3 import S3Store
from tests.s3 import S3Server

POLICIES = Path(__file__).resolve().parent.parent.parent / "infra" / "policies"
ACTIONS = {
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "DeleteObject": "s3:DeleteObject",
    "ListObjectsV2": "s3:ListBucket",
    "HeadBucket": "s3:ListBucket",
}


class Call(NamedTuple):
    action: str
    key: str  # or the prefix of a listing


@contextmanager
def recorded(store: S3Store) -> Iterator[set[Call]]:
    calls: set[Call] = set()

    def note(params: Any, model: Any, **_: Any) -> None:
        calls.add(Call(ACTIONS[model.name], params.get("Key") or params.get("Prefix") or ""))

    store._client.meta.events.register("provide-client-params.s3", note)
    yield calls


def grants(policy: Any, location: S3Location) -> list[tuple[str, str]]:
    """(action, pattern of keys or prefixes)"""
    found = []
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        for action in statement["Action"]:
            patterns = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix")
            if patterns is None:
                patterns = [resource.partition("BUCKET/")[2] for resource in statement["Resource"]]
            found += [(action, pattern.replace("PREFIX", location.prefix)) for pattern in patterns]
    return found


@pytest.fixture
def store(s3_server: S3Server) -> S3Store:
    location = parse_location(s3_server.url("policies", "adapters"))
    assert isinstance(location, S3Location)
    return S3Store(location)


@pytest.fixture
def folder(tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path]) -> Path:
    folder = peft_folder(tiny_base())
    describe(folder, tiny_base())
    return folder


def serve(store: S3Store, folder: Path, tmp_path: Path) -> None:
    adapters = AdapterStore(store)
    (digest,) = [Path(key).stem for key in S3Store(store.location).list("manifests/")]
    manifest = adapters.manifest(digest)
    sha256 = manifest.files["adapter_model.safetensors"]
    adapters.file_size(digest, "adapter_model.safetensors", sha256)
    adapters.read_range(digest, "adapter_model.safetensors", sha256, 0, 100)
    adapters.fetch(digest, tmp_path / "fetched")
    with pytest.raises(NotFoundError):
        adapters.manifest("0" * 64)


def publish(store: S3Store, folder: Path, tmp_path: Path) -> None:
    uploads = Uploads(AdapterStore(store), "acme")
    upload = uploads.begin("key")
    uploads.put(upload, "adapter_config.json", folder / "adapter_config.json")
    digest = AdapterStore(store).put(folder)
    AdapterStore(store).put(folder)
    AdapterStore(store).check_files(digest, AdapterStore(store).manifest(digest))
    uploads.delete(upload)


@pytest.mark.parametrize(("role", "work"), [("serving", serve), ("publishing", publish)])
def test_a_role_may_do_what_it_does(
    role: str, work: Callable[[S3Store, Path, Path], None], store: S3Store, folder: Path, tmp_path: Path
) -> None:
    AdapterStore(S3Store(store.location)).put(folder)
    with recorded(store) as calls:
        work(store, folder, tmp_path)
    allowed = grants(json.loads((POLICIES / f"{role}.json").read_text()), store.location)
    for call in calls:
        assert any(call.action == action and fnmatch.fnmatchcase(call.key, p) for action, p in allowed), call
    used = {call.action for call in calls} | {"s3:AbortMultipartUpload"}  # of large objects on AWS
    assert {action for action, _ in allowed} <= used
    if role == "serving":
        assert not {action for action, _ in allowed} & {"s3:PutObject", "s3:DeleteObject"}
