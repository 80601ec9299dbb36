"""The bucket's policies allow what each role does against a real server, and nothing that it does not do.

What training does is in `test_deploy`, where a job trains and publishes under its policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loray.adapters.manifest import describe
from loray.bases.registry import BaseModel
from loray.errors import NotFoundError, StoreError
from loray.locations import S3Location, parse_location
from loray.publishing.uploads import Uploads
from loray.store import AdapterStore
from loray.store.s3 import S3Store
from serve_apps.accounting.usage import StoredEvents
from tests.fixtures.s3 import S3Server
from tests.infra.policy_server import Asked, Policy, PolicyServer, asked

BLOB, MANIFEST, RUN = "adapters/blobs/ab/abcd", "adapters/manifests/ab/abcd.json", "adapters/runs/my-lora/1/step_1/x"
USAGE = "adapters/usage/gateway-1/000000.jsonl"
DATA, THEIRS = "data/default/train.jsonl", "data/globex/train.jsonl"


@pytest.fixture
def server(s3_server: S3Server) -> Iterator[PolicyServer]:
    location = parse_location(s3_server.url("policies", "adapters"))
    assert isinstance(location, S3Location)
    server = PolicyServer(location)
    yield server
    server.close()


@pytest.fixture
def folder(tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path]) -> Path:
    folder = peft_folder(tiny_base())
    describe(folder, tiny_base())
    return folder


def serve(store: S3Store, folder: Path, tmp_path: Path) -> None:
    adapters = AdapterStore(store)
    digest = adapters_in(tmp_path)
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


def keep_usage(store: S3Store, folder: Path, tmp_path: Path) -> None:
    stored = StoredEvents(lambda: store, "gateway-1")
    stored.put([])
    for key, _ in stored.all():
        stored.delete(key)


def adapters_in(tmp_path: Path) -> str:
    """The digest of the adapter that was there before."""
    return (tmp_path / "digest").read_text()


@pytest.mark.parametrize(("role", "work"), [("serving", serve), ("publishing", publish), ("gateway", keep_usage)])
def test_a_role_may_do_what_it_does(
    role: str, work: Callable[[S3Store, Path, Path], None], server: PolicyServer, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "digest").write_text(AdapterStore(S3Store(server.location)).put(folder))
    with server.role(role) as policy:
        work(S3Store(server.location), folder, tmp_path)
    assert not server.refused
    used = {one.action for one in server.asked} | {"s3:AbortMultipartUpload"}  # of large objects on AWS
    assert policy.actions <= used


def test_a_role_is_refused_the_rest(server: PolicyServer, folder: Path) -> None:
    with server.role("serving"), pytest.raises(StoreError):
        AdapterStore(S3Store(server.location)).put(folder)
    assert {one.action for one in server.refused} == {"s3:PutObject"}


@pytest.mark.parametrize(
    ("role", "action", "keys"),
    [
        ("serving", "s3:PutObject", (BLOB, MANIFEST, RUN, DATA)),
        ("serving", "s3:DeleteObject", (BLOB, MANIFEST, RUN, DATA)),
        ("serving", "s3:GetObject", (RUN, DATA)),
        ("publishing", "s3:DeleteObject", (BLOB, MANIFEST, RUN, DATA)),
        ("publishing", "s3:GetObject", (RUN, DATA)),
        ("gateway", "s3:GetObject", (BLOB, MANIFEST, RUN, DATA)),
        ("gateway", "s3:PutObject", (BLOB, MANIFEST, RUN, DATA)),
        ("serving", "s3:PutObject", (USAGE,)),
        ("training", "s3:DeleteObject", (BLOB, MANIFEST, DATA, THEIRS, "adapters/uploads/acme/1/x")),
        ("training", "s3:PutObject", (DATA, THEIRS, "adapters/uploads/acme/1/x")),
        ("training", "s3:GetObject", (THEIRS, "adapters/uploads/acme/1/x")),
    ],
)
def test_what_no_role_may(role: str, action: str, keys: tuple[str, ...]) -> None:
    policy = Policy(role, S3Location("bucket", "adapters"))
    assert not any(policy.allows(Asked(action, f"bucket/{key}")) for key in keys)
    assert not policy.allows(Asked(action, f"other/{BLOB}"))


@pytest.mark.parametrize(
    ("method", "target", "needed"),
    [
        ("GET", "/b/k%20x?x-id=GetObject", Asked("s3:GetObject", "b/k x")),
        ("PUT", "/b/k?partNumber=1&uploadId=2", Asked("s3:PutObject", "b/k")),
        ("POST", "/b/k?uploads", Asked("s3:PutObject", "b/k")),
        ("DELETE", "/b/k?uploadId=2", Asked("s3:AbortMultipartUpload", "b/k")),
        ("DELETE", "/b/k", Asked("s3:DeleteObject", "b/k")),
        ("POST", "/b?delete", Asked("s3:DeleteObject", "b/of body")),
        ("GET", "/b?list-type=2&prefix=a%2F", Asked("s3:ListBucket", "b", "a/")),
        ("GET", "/b?list-type=2", Asked("s3:ListBucket", "b", "")),
        ("DELETE", "/b", Asked("s3:DeleteBucket", "b")),
    ],
)
def test_requests_need_permissions(method: str, target: str, needed: Asked) -> None:
    body = b'<Delete xmlns="x"><Object><Key>of body</Key></Object></Delete>'
    assert asked(method, target, body) == [needed]
