"""Versions in every form over HTTP: archives, checkpoints and GGUF that processes make, URLs of a bucket."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from loray.adapters.manifest import ManifestDetails, describe, verify_folder
from loray.adapters.peft_format import read_adapter
from loray.bases.registry import BaseModel, add_base
from loray.catalog import AdapterVersion
from loray.client import CatalogClient, catalog
from loray.errors import BaseMismatch, ClusterError, IntegrityError
from loray.publishing import Destination, import_folder
from loray.publishing.uploads import adapter_as_tar, as_tar
from loray.scratch import Scratch
from loray.spec import Principal
from loray.store import adapters
from serve_apps.api.site import create_app
from tests.fixtures.api import Api, InProcess, mounted, problem
from tests.fixtures.s3 import S3Server
from tests.fixtures.stores import damage_object


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_every_form(
    api: Api, client: CatalogClient, base: BaseModel, peft_folder: Callable[..., Path], tmp_path: Path, scratch: Path
) -> None:
    import_folder(peft_folder(base, "vera"), base, Destination("tone", api.services.store, api.catalog))
    client.fetch("tone", 1, tmp_path / "peft")
    digest = api.catalog.adapters.version("tone", 1).digest
    assert verify_folder(tmp_path / "peft") == api.services.store.manifest(digest)
    client.fetch("tone", 1, tmp_path / "merged", "merged")
    assert add_base(str(tmp_path / "merged"), home=tmp_path / "other", name="merged").config == base.config
    answer = api.http.get("/adapters/tone/versions/1/download", params={"format": "gguf"})
    assert answer.content[:4] == b"GGUF"
    assert (answer.headers["content-length"], answer.headers["etag"]) == (str(len(answer.content)), f'"{digest}-gguf"')
    assert answer.headers["content-disposition"] == 'attachment; filename="tone-1.gguf"'
    assert list(scratch.iterdir()) == []


def test_forms_that_cannot_be_made(
    api: Api, client: CatalogClient, tone: AdapterVersion, tmp_path: Path, scratch: Path
) -> None:
    blob = tone.manifest.files["adapter_model.safetensors"]
    api.services.store.objects.delete(api.services.store.keys_of(blob)[0])
    with pytest.raises(IntegrityError, match="is missing from the store"):
        client.fetch("tone", 1, tmp_path / "x.gguf", "gguf")  # as the process says it
    shutil.rmtree(api.settings.home / "bases")
    with pytest.raises(BaseMismatch, match="which this machine does not have"):
        client.fetch("tone", 1, tmp_path / "x.gguf", "gguf")
    problem(api.http.get("/adapters/tone/versions/1/download", params={"format": "zip"}), 422)
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "x.gguf").exists()


# -- archives ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read in many pieces."""
    monkeypatch.setattr(adapters, "_PIECE_BYTES", 4096)


@pytest.mark.usefixtures("small_pieces")
def test_a_folder_is_sent_from_the_store_without_a_copy(
    api: Api, base: BaseModel, peft_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder, store = peft_folder(base), api.services.store
    (folder / "README.md").write_bytes(b"")
    version = import_folder(folder, base, Destination("tone", store, api.catalog))
    store.fetch(version.digest, tmp_path / "fetched")
    expected = as_tar(tmp_path / "fetched", "tone-1")
    api.services.scratch = Scratch(0)
    for path in ("/adapters/tone/versions/1/download", "/console/adapters/tone/versions/1/download"):
        assert api.http.get(path).content == b"".join(as_tar(tmp_path / "fetched", "tone-1").chunks)
        assert int(api.http.get(path).headers["content-length"]) == expected.num_bytes


@pytest.mark.usefixtures("small_pieces")
def test_a_damaged_file_ends_the_connection_before_the_archive(
    api: Api, url: str, tone: AdapterVersion, tmp_path: Path
) -> None:
    store = api.services.store
    damage_object(store.objects, store.keys_of(tone.manifest.files["adapter_model.safetensors"])[0])
    with CatalogClient(url) as client, pytest.raises(ClusterError, match="closed connection without sending complete"):
        client.fetch("tone", 1, tmp_path / "got")
    assert not (tmp_path / "got").exists()
    assert api.services.downloads._taken == {}


@pytest.mark.usefixtures("small_pieces")
def test_what_is_lost_meanwhile_is_noticed(api: Api, tone: AdapterVersion) -> None:
    store = api.services.store
    blob = store.keys_of(tone.manifest.files["adapter_model.safetensors"])[0]
    whole = store.objects.get(blob)
    for left, error in ((None, "is missing from the store"), (whole[:-1], "differs from its SHA-256")):
        archive = adapter_as_tar(store, tone.digest, tone.manifest, "tone-1")
        sent = [next(archive.chunks)]
        store.objects.delete(blob)
        if left is not None:
            store.objects.put_if_absent(blob, left)
        with pytest.raises(IntegrityError, match=error):
            sent.extend(archive.chunks)
        assert sum(map(len, sent)) < archive.num_bytes
        store.objects.delete(blob)
        store.objects.put_if_absent(blob, whole)
    store.objects.delete(blob)
    problem(api.http.get("/adapters/tone/versions/1/download"), 500)


def test_who_may_not_know_how_a_version_was_made_does_not_read_it_in_its_folder(
    api: Api, base: BaseModel, peft_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, store = peft_folder(base), api.services.store
    api.catalog.bases.add(base.name, base.fingerprint)
    for tenant in ("acme", "beta"):
        api.catalog.tenants.create(tenant)
    describe(folder, base, ManifestDetails(job_id="train_7", data_fingerprint="5b" * 32, parent="5a" * 32))
    acme = api.catalog.view(Principal(tenant="acme"))
    version = import_folder(folder, base, Destination("tone", store, acme))
    acme.adapters.share("tone", "public")
    monkeypatch.setattr(type(store.objects), "presigned", lambda self, key, expires_s: "http://127.0.0.1:1/x")
    told = {}
    for tenant in ("acme", "beta"):
        key = api.catalog.keys.create(tenant, tenant=tenant, scopes=["publish"]).secret
        with CatalogClient("http://test", api_key=key, transport=api.transport) as client:
            client.fetch("acme/tone", 1, tmp_path / tenant)  # the store's URLs lead nowhere
            told[tenant] = client.version("acme/tone", 1).manifest
            answer = client._request("GET", "/adapters/tone/versions/1/download?tenant=acme&presigned=true")
            for number in (1, 2):  # names of its own
                told[f"{tenant} {number}"] = client.register(f"copy-{number}", version.digest).manifest
        assert verify_folder(tmp_path / tenant) == told[tenant]
        assert (answer.headers["content-type"] == "application/json") == (tenant == "acme")
    assert told["acme"] == told["acme 1"] == told["acme 2"] == version.manifest
    assert told["beta"] == told["beta 1"] == told["beta 2"]
    assert (told["beta"].job_id, told["beta"].data_fingerprint, told["beta"].parent) == (None, None, None)


# -- buckets ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(api: Api, s3_server: S3Server) -> list[str]:
    """What came to the API, whose store is a bucket."""
    api.replace_services(store=s3_server.url("downloads", "adapters"))
    asked: list[str] = []
    app = mounted(create_app(api.services, api.access))

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        asked.append(f"{scope['path'].rpartition('/')[2]}?{scope['query_string'].decode()}")
        await app(scope, receive, send)

    api.transport = InProcess(noting)
    return asked


def test_bytes_come_from_the_bucket(
    api: Api, asked: list[str], base: BaseModel, tone: AdapterVersion, tmp_path: Path
) -> None:
    store = api.services.store
    key = "sk-lr-" + "A" * 43  # which the bucket must not be sent: it would refuse it
    client = CatalogClient("http://test", api_key=key, transport=api.transport)
    client.fetch("tone", 1, tmp_path / "got")
    assert verify_folder(tmp_path / "got") == tone.manifest
    assert read_adapter(tmp_path / "got", base.config).modules
    assert asked == ["download?presigned=true"]
    found = json.loads(client._request("GET", "/adapters/tone/versions/1/download?presigned=true").content)
    sizes = {file["name"]: file["nbytes"] for file in found["files"]}
    assert sizes == {path.name: path.stat().st_size for path in (tmp_path / "got").iterdir()}
    assert list(sizes.values()) == sorted(sizes.values())
    for file in found["files"]:
        query = parse_qs(urlsplit(file["url"]).query)
        assert (query["X-Amz-Expires"], query["X-Amz-Algorithm"]) == (["300"], ["AWS4-HMAC-SHA256"])

    blob = store.keys_of(tone.manifest.files["adapter_config.json"])[0]
    store.objects.delete(blob)
    store.objects.put_if_absent(blob, b"{}")
    with pytest.raises(IntegrityError, match=r"adapter_config\.json differs from its SHA-256"):
        client.fetch("tone", 1, tmp_path / "changed")
    store.objects.delete(blob)
    with pytest.raises(IntegrityError, match="is missing from the store"):
        client.fetch("tone", 1, tmp_path / "missing")
    assert not [path for path in tmp_path.iterdir() if path.name in ("changed", "missing") or path.name[0] == "."]


def test_a_bucket_that_only_the_server_reaches(
    api: Api, asked: list[str], tone: AdapterVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        type(api.services.store.objects), "presigned", lambda self, key, expires_s: "http://127.0.0.1:1/x"
    )
    CatalogClient("http://test", transport=api.transport).fetch("tone", 1, tmp_path / "got")
    assert verify_folder(tmp_path / "got") == tone.manifest
    assert asked == ["download?presigned=true", "download?format=peft"]


def test_names_of_files_are_plain(tmp_path: Path) -> None:
    for name in ("../x", "/etc/x", ".bashrc", "", "a/b"):
        file = catalog.PresignedFileResource(name=name, sha256="0" * 64, nbytes=1, url="http://127.0.0.1:1")
        with pytest.raises(IntegrityError, match="not a plain one"):
            catalog._read_from_store(file, tmp_path)
