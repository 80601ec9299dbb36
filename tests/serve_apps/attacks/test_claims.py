"""What an uploaded manifest claims, and nobody here has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from loray.adapters.manifest import describe, manifest_json, read_manifest, write_manifest
from loray.bases.registry import BaseModel
from loray.client import CatalogClient
from loray.errors import GateRefused
from loray.spec import RopeParameters
from tests.catalog.test_catalog import digest, manifest
from tests.catalog.test_gate import figures
from tests.catalogs import sqlite_catalog
from tests.serve_apps.api.fakes import Api
from tests.serve_apps.keys import access_of

MADE_UP: Any = {"job_id": "train_5f1b", "sweep": "best/1 3"}


@pytest.fixture
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base()


@pytest.fixture
def api(tmp_path: Path, base: BaseModel) -> Iterator[Api]:
    url = sqlite_catalog(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    (home / "bases").symlink_to(base.path.parent)
    with closing(Api(home, url, access_of(url, host="0.0.0.0"))) as api:
        yield api


def client_of(api: Api, *scopes: Any) -> CatalogClient:
    key = api.catalog.create_key(" ".join(scopes), scopes=scopes).secret
    return CatalogClient("http://test", api_key=key, transport=api.transport)


def upload(client: CatalogClient, folder: Path) -> str:
    id = client.begin_upload().id
    for path in sorted(folder.iterdir()):
        client.put_file(id, path)
    return id


def test_the_gate_believes_no_measurement_that_was_uploaded(
    api: Api, base: BaseModel, peft_folder: Callable[..., Path]
) -> None:
    folder = peft_folder(base)
    native = base.config.max_position_embeddings
    rope = RopeParameters(rope_type="linear", rope_theta=1e4, factor=2)
    good = {("adapter", 2 * native): 9.0, ("base", 2 * native): 10.0, ("base_scaled", 2 * native): 12.0}
    good |= {("adapter", native): 10.0, ("base", native): 10.0}
    update = {"method": "longlora", "rope_parameters": rope, "context_length": 2 * native}
    update |= {"original_context_length": native, "evaluations": figures(good)}
    write_manifest(folder, manifest_json(describe(folder, base).model_copy(update=update)))
    client = client_of(api, "publish", "promote")
    with pytest.raises(GateRefused, match="have not been measured on the same data"):
        client.register("tone", upload=upload(client, folder), aliases=["prod"])
    version = client.register("tone", upload=upload(client, folder))
    assert version.manifest.evaluations == ()
    with pytest.raises(GateRefused, match="have not been measured on the same data"):
        client.promote("tone", "prod", 1)
    api.catalog.record_evaluations(version.digest, figures(good))  # measured by somebody who has the database
    assert client.promote("tone", "prod", 1).version == 1


def test_lineage_is_kept_where_the_sender_has_it(api: Api, base: BaseModel, peft_folder: Callable[..., Path]) -> None:
    folder = peft_folder(base)
    known, unknown = digest(1), digest(2)
    api.catalog.register("before", known, manifest(1))
    described = describe(folder, base)
    client = client_of(api, "publish")
    for claimed, kept in ((known, known), (unknown, None)):
        told = described.model_copy(update=MADE_UP | {"parent": claimed, "derived_from": claimed})
        write_manifest(folder, manifest_json(told))
        version = client.register("tone", upload=upload(client, folder))
        found = version.manifest
        assert (found.parent, found.derived_from, found.job_id, found.sweep) == (kept, kept, None, None)
    write_manifest(folder, manifest_json(described))
    same = client.register("tone", upload=upload(client, folder))
    assert same.manifest == read_manifest(folder)  # nothing was made up: nothing is left out
