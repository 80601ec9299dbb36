"""What tenants store: manifests, versions and names are limited before they are kept, and lists of them are small."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from loray.adapters.manifest import ManifestDetails, describe, manifest_json, read_manifest
from loray.bases.registry import BaseModel
from loray.catalog import Catalog, allowances
from loray.catalog.schema import versions
from loray.client import CatalogClient
from loray.errors import SpecError
from loray.publishing import Destination, import_folder
from loray.spec import MAX_EVALUATIONS, MAX_MANIFEST_BYTES, Evaluation, Principal
from tests.fixtures.api import Api
from tests.fixtures.versions import digest, manifest

# -- manifests --------------------------------------------------------------------------------------------------------


def test_a_manifest_of_257_kib_is_refused_before_it_is_stored(api: Api) -> None:
    upload = api.http.post("/uploads").json()["id"]
    refused = api.http.put(f"/uploads/{upload}/files/loray.json", content=b" " * (257 << 10))
    assert (refused.status_code, api.http.get(f"/uploads/{upload}").json()["files"]) == (413, [])
    kept = api.http.put(f"/uploads/{upload}/files/loray.json", content=b" " * MAX_MANIFEST_BYTES)
    assert kept.status_code == 200


@pytest.mark.parametrize(
    ("too_much", "said"),
    [
        ({"description": "x" * 4097}, "4,097 characters of description, and may have 4,096"),
        ({"licence": "x" * MAX_MANIFEST_BYTES}, "bytes with its recipe, evaluations and template"),
        (
            {"evaluations": (Evaluation(metric="loss", value=1.0, dataset="x"),) * (MAX_EVALUATIONS + 1)},
            "1,025 evaluations",
        ),
    ],
)
def test_a_manifest_that_is_too_large_is_published_by_no_way(
    api: Api,
    tiny_base: Callable[..., BaseModel],
    peft_folder: Callable[..., Path],
    too_much: dict[str, object],
    said: str,
) -> None:
    """As a folder with its manifest, and as what the store has already."""
    base = tiny_base()
    folder = peft_folder(base)
    large = describe(folder, base).model_copy(update=too_much)
    (folder / "loray.json").write_bytes(manifest_json(large))
    with pytest.raises(SpecError, match=said):
        import_folder(folder, base, Destination("tone", api.services.store, api.catalog))
    stored = api.services.store.put(folder)
    refused = api.http.post("/adapters/tone/versions", json={"digest": stored})
    assert (refused.status_code, said in refused.json()["detail"]) == (422, True)
    assert tuple(api.catalog.snapshot().models()) == ()


def test_a_manifest_that_was_published_before_stays_readable(api: Api) -> None:
    api.catalog.adapters.register("tone", digest(1), manifest(1))
    large = manifest(1).model_copy(update={"description": "x" * (15 << 20)})
    with api.catalog._db.engine.begin() as c:
        c.execute(versions.update().values(manifest=manifest_json(large).decode()))
    assert api.http.get("/adapters/tone/versions/1").json()["manifest"]["description"] == large.description
    assert [v.version for v in CatalogClient("http://test", transport=api.transport).versions("tone")] == [1]


def test_what_was_described_can_be_uploaded(
    tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path]
) -> None:
    """Indented it might be larger than a file of its name may be."""
    base = tiny_base()
    folder = peft_folder(base)
    small = len(manifest_json(describe(folder, base)))
    template = '{{ "' + "x" * (MAX_MANIFEST_BYTES // 2 - 10) + '" }}'
    (folder / "chat_template.jinja").write_text(template)
    measured = [
        Evaluation(metric="loss", value=i, dataset="x" * 64) for i in range((MAX_MANIFEST_BYTES // 2 - small) // 130)
    ]
    described = describe(folder, base, ManifestDetails(evaluations=measured))
    file = folder / "loray.json"
    assert file.stat().st_size <= MAX_MANIFEST_BYTES < len(json.dumps(described.model_dump(mode="json"), indent=2))
    assert read_manifest(folder) == described


# -- names ------------------------------------------------------------------------------------------------------------


def test_a_key_makes_no_more_names_than_its_tenant_may_have(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every gateway holds all names in memory. Fifty are asked for, of one upload."""
    monkeypatch.setattr(allowances, "DEFAULT_MAX_ADAPTERS", 20)
    stored = api.store(1, tmp_path)
    api.catalog.bases.add("smollm2", manifest(1).base_fingerprint)
    api.catalog.tenants.create("acme")
    api.catalog.view(Principal(tenant="acme")).adapters.record_upload(stored)
    key = api.catalog.keys.create("publisher", tenant="acme", scopes=["publish"]).secret
    api.http.headers["Authorization"] = f"Bearer {key}"
    answers = [api.http.post(f"/adapters/n{i}/versions", json={"digest": stored}) for i in range(50)]
    assert [answer.status_code for answer in answers] == [201] * 20 + [403] * 30
    problem = answers[-1].json()
    assert problem["type"].endswith(":limit-exceeded")
    assert problem["detail"].startswith("tenant acme would have 21 adapters, and may have 20")


# -- lists ------------------------------------------------------------------------------------------------------------


def test_a_list_of_versions_reads_no_manifests(api: Api) -> None:
    """A thousand versions take the statements that ten take, and little memory, whatever their manifests hold."""
    add_versions(api.settings.catalog, 1000)
    few, _ = measured(api, 10)
    many, num_bytes = measured(api, 1000)
    assert few == many
    assert num_bytes < 64 << 20


def measured(api: Api, limit: int) -> tuple[list[str], int]:
    """The statements of a list of `limit` versions, and the bytes that were allocated at once for it."""
    seen: list[str] = []
    engine = api.catalog._db.engine
    listen = (engine, "before_cursor_execute", lambda _c, _cursor, statement, *_: seen.append(statement))
    sa.event.listen(*listen)
    tracemalloc.start()
    try:
        answer = api.http.get("/adapters/tone/versions", params={"limit": limit})
        return seen, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        sa.event.remove(*listen)
        assert len(answer.json()["items"]) == limit


def add_versions(url: str, number: int) -> None:
    """Versions of `tone` with manifests of 200 KiB each, as if they had been published."""
    catalog = Catalog(url)
    catalog.adapters.register("tone", digest(1), manifest(1))
    large = manifest(1).model_copy(update={"description": "x" * (200 << 10)})
    engine = catalog._db.engine
    with engine.begin() as c:
        row = c.execute(sa.select(versions)).one()._asdict() | {"manifest": manifest_json(large).decode()}
        del row["id"]
        c.execute(versions.insert(), [row | {"version": n, "digest": digest(n)} for n in range(2, number + 1)])
    catalog.close()


def test_a_page_of_versions_ends_where_it_has_thousands_of_evaluations(api: Api) -> None:
    figure = Evaluation(metric="loss", value=1.0, dataset="held-out")
    large = manifest(1).model_copy(update={"evaluations": (figure,) * 1000})
    for number in range(1, 8):
        api.catalog.adapters.register("tone", digest(number), large)
    page = api.http.get("/adapters/tone/versions").json()
    assert ([item["version"] for item in page["items"]], page["next"]) == ([7, 6, 5, 4], "4")
    client = CatalogClient("http://test", transport=api.transport)
    assert [v.version for v in client.versions("tone")] == [7, 6, 5, 4, 3, 2, 1]
