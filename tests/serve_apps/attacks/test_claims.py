"""What an uploaded manifest claims, and nobody here has seen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from loray.adapters.manifest import describe, manifest_json, read_manifest, write_manifest
from loray.bases.registry import BaseModel
from loray.client import CatalogClient
from loray.errors import AdapterNotFound, ConflictError, GateRefused, PermissionDenied, SettingsError
from loray.settings import Settings
from loray.spec import Evaluation, RopeParameters
from serve_apps.api.services import Services
from tests.fixtures.api import Api
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.figures import figures
from tests.fixtures.keys import access_of
from tests.fixtures.versions import digest, manifest

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
    key = api.catalog.keys.create(" ".join(scopes), scopes=scopes).secret
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
    api.catalog.evaluations.record(version.digest, figures(good))  # measured by somebody who has the database
    assert client.promote("tone", "prod", 1).version == 1


def test_the_gate_believes_no_measurement_that_a_client_has_reported(
    api: Api, base: BaseModel, peft_folder: Callable[..., Path]
) -> None:
    folder = peft_folder(base)
    native = base.config.max_position_embeddings
    rope = RopeParameters(rope_type="linear", rope_theta=1e4, factor=2)
    update = {"method": "longlora", "rope_parameters": rope, "context_length": 2 * native}
    described = describe(folder, base).model_copy(update=update | {"original_context_length": native})
    write_manifest(folder, manifest_json(described))
    client = client_of(api, "publish", "promote")
    stored = client.register("tone", upload=upload(client, folder)).digest
    bad, good = (
        {("adapter", 2 * native): at_its_own, ("base", 2 * native): 10.0, ("base_scaled", 2 * native): 12.0}
        | {("adapter", native): 10.0, ("base", native): 10.0}
        for at_its_own in (11.0, 9.0)
    )
    reported = client.report_evaluations("tone", 1, figures(good))
    assert {e.measured_by for e in reported.evaluations} == {"key"}
    with pytest.raises(GateRefused, match="have not been measured on the same data"):
        client.promote("tone", "prod", 1)
    api.catalog.evaluations.record(stored, figures(bad))
    client.report_evaluations("tone", 1, figures(good))  # what is reported later hides nothing
    with pytest.raises(GateRefused, match="its perplexity 11 is not below 10 of the base"):
        client.promote("tone", "prod", 1)
    (entry, *_) = api.catalog.audit.page(action="evaluate").items
    assert (entry.actor.partition(" (")[0], entry.subject, entry.detail) == ("publish promote", stored, {"count": 5})
    env = api.settings.to_env() | {"LORAY_GATE_TRUSTS": "keys"}
    settings = Settings.from_env(Settings.from_env(env).to_env())
    with closing(Services(settings, api.jobs, api.placements)) as trusting:
        assert trusting.catalog.aliases.move("tone", "prod", 1).version == 1
    with pytest.raises(SettingsError, match="LORAY_GATE_TRUSTS='all' must be jobs or keys"):
        Settings.from_env({"LORAY_GATE_TRUSTS": "all"})


def test_what_is_reported_is_bounded_and_the_tenants_own(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.catalog.tenants.create("acme")
    api.catalog.adapters.register("tone", digest(1), manifest(1))
    api.catalog.adapters.share("tone", "public")
    measured = [Evaluation(metric="acc", value=0.5, dataset="letters")]
    other = api.catalog.keys.create("other", tenant="acme", scopes=["publish"]).secret
    stranger = CatalogClient("http://test", api_key=other, transport=api.transport)
    with pytest.raises(PermissionDenied):
        stranger.report_evaluations("default/tone", 1, measured)
    with pytest.raises(PermissionDenied):
        client_of(api, "promote", "train", "infer").report_evaluations("tone", 1, measured)
    client = client_of(api, "publish")
    with pytest.raises(AdapterNotFound):
        client.report_evaluations("tone", 2, measured)
    key = api.catalog.keys.create("raw", scopes=["publish"]).secret
    for wrong in (
        {"value": math.nan},
        {"value": math.inf},
        {"metric": "a" * 65},
        {"dataset": "a\0b"},
        {"count": 1 << 31},
        {"measured_by": "key"},
    ):
        body = json.dumps({"evaluations": [{"metric": "acc", "value": 0.5, "dataset": "letters"} | wrong]})
        headers = {"Authorization": f"Bearer {key}"}
        told = api.http.post("/adapters/tone/versions/1/evaluations", content=body, headers=headers)
        assert told.status_code == 422, wrong
    monkeypatch.setattr("loray.catalog.adapters.MAX_REPORTED", 3)
    client.report_evaluations("tone", 1, measured * 3)
    with pytest.raises(ConflictError, match="has 3 evaluations that clients have reported"):
        client.report_evaluations("tone", 1, measured)
    api.catalog.evaluations.record(digest(1), measured)  # those of loray itself are not counted
    assert len(client.version("tone", 1).evaluations) == 4


def test_lineage_is_kept_where_the_sender_has_it(api: Api, base: BaseModel, peft_folder: Callable[..., Path]) -> None:
    folder = peft_folder(base)
    known, unknown = digest(1), digest(2)
    api.catalog.adapters.register("before", known, manifest(1))
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
