"""The OpenAPI document of the catalog's API: generated requests get only responses that it describes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from schemathesis import GenerationMode

from loray.errors import AdapterNotFound
from loray.policy.auth import KeyRing
from loray.spec import Principal
from tests.fixtures.versions import BASE, publish
from tests.serve_apps.api.fakes import Api
from tests.serve_apps.api.test_jobs import submit
from tests.serve_apps.keys import access_of
from tests.serve_apps.schemas import (
    CHECKS,
    NEGATIVE_CHECKS,
    Headers,
    document_of,
    examples,
    expected,
    headers_of_each_kind,
    needing_keys,
)

TAKE_NOTHING = {"GET /bases", "GET /keys/self", "GET /tenants"}  # that could be wrong
KNOWN = {"name": "tone", "alias": "prod", "version": 1, "id": "job-1", "key": "team"}
KEY = "a key of the deployment itself, long enough"
HEADERS = {"Authorization": f"Bearer {KEY}"}
OPERATIONS = [
    "DELETE /adapters/{name}",
    "DELETE /adapters/{name}/aliases/{alias}",
    "DELETE /adapters/{name}/aliases/{alias}/canary",
    "DELETE /adapters/{name}/tags/{key}",
    "DELETE /adapters/{name}/versions/{version}",
    "DELETE /adapters/{name}/versions/{version}/quarantine",
    "DELETE /keys/{id}",
    "DELETE /uploads/{id}",
    "GET /adapters",
    "GET /adapters/{name}",
    "GET /adapters/{name}/aliases",
    "GET /adapters/{name}/aliases/{alias}",
    "GET /adapters/{name}/aliases/{alias}/canary",
    "GET /adapters/{name}/placement",
    "GET /adapters/{name}/tags",
    "GET /adapters/{name}/versions",
    "GET /adapters/{name}/versions/{version}",
    "GET /adapters/{name}/versions/{version}/download",
    "GET /audit",
    "GET /bases",
    "GET /jobs",
    "GET /jobs/{id}",
    "GET /jobs/{id}/logs",
    "GET /keys",
    "GET /keys/self",
    "GET /keys/{id}",
    "GET /recommend",
    "GET /tenants",
    "GET /tenants/{name}",
    "GET /uploads/{id}",
    "GET /usage",
    "PATCH /adapters/{name}",
    "PATCH /keys/{id}",
    "PATCH /tenants/{name}",
    "POST /adapters/{name}/aliases/{alias}/rollback",
    "POST /adapters/{name}/restore",
    "POST /adapters/{name}/transfer",
    "POST /adapters/{name}/versions",
    "POST /adapters/{name}/versions/{version}/evaluations",
    "POST /adapters/{name}/versions/{version}/restore",
    "POST /jobs",
    "POST /jobs/{id}/stop",
    "POST /keys",
    "POST /keys/{id}/rotate",
    "POST /tenants",
    "POST /uploads",
    "PUT /adapters/{name}/aliases/{alias}",
    "PUT /adapters/{name}/aliases/{alias}/canary",
    "PUT /adapters/{name}/tags/{key}",
    "PUT /uploads/{id}/files/{name}",
]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    home = tmp_path_factory.mktemp("home")
    url = f"sqlite:///{home}/catalog.db"
    ring = KeyRing(static={hashlib.sha256(KEY.encode()).digest(): Principal(key_id="deployment")})
    api = Api(home, url, access_of(url, host="0.0.0.0", ring=ring))
    api.http.headers.update(HEADERS)
    api.catalog.add_base("smollm2", BASE)
    publish(api.catalog, "tone", 1, 2, aliases=("prod",))
    api.catalog.set_tag("tone", "team", "support")
    submit(api, "job-1")
    yield api
    api.close()


@pytest.fixture(scope="module")
def document(api: Api) -> Any:
    return api.http.get("/openapi.json").json()


CASES = [
    pytest.param(operation, mode, id=f"{mode.value} {operation}")
    for operation in OPERATIONS
    for mode in GenerationMode
    if mode == GenerationMode.POSITIVE or operation not in TAKE_NOTHING
]


@pytest.fixture(scope="module")
def callers(api: Api) -> dict[str, Headers]:
    return headers_of_each_kind(api.catalog)


def cases_of(api: Api, operation: str, mode: GenerationMode) -> Any:
    method, path = operation.split()
    return document_of(api.app, "/api/v1/openapi.json")[path][method].as_strategy(generation_mode=mode)


def prepare(api: Api, case: Any, mode: GenerationMode) -> None:
    """There is an alias that can be rolled back, whatever came before, and a valid request asks what there is."""
    for deleted in (None, 1):
        with suppress(AdapterNotFound):
            api.catalog.restore("tone", deleted)
    for version in (1, 2):
        api.catalog.promote("tone", "prod", version)
    if mode == GenerationMode.POSITIVE:
        case.path_parameters |= {name: KNOWN[name] for name in case.path_parameters}


@pytest.mark.parametrize(("operation", "mode"), CASES)
def test_every_answer_is_described(api: Api, operation: str, mode: GenerationMode) -> None:
    """`mode`: valid requests for existing resources, or invalid ones, which must be refused."""

    @given(case=cases_of(api, operation, mode))
    @examples(6 if mode == GenerationMode.POSITIVE else 12)  # there are more ways to be wrong than to be right
    def ask(case: Any) -> None:
        prepare(api, case, mode)
        case.call_and_validate(checks=NEGATIVE_CHECKS, headers=HEADERS)

    ask()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_answer_to_a_key_is_described(api: Api, callers: dict[str, Headers], operation: str) -> None:
    @given(case=cases_of(api, operation, GenerationMode.POSITIVE))
    @examples(1)
    def ask(case: Any) -> None:
        for name, headers in callers.items():
            if name in ("none", "admin") or (expected(name) is None and not operation.startswith("GET")):
                prepare(api, case, GenerationMode.POSITIVE)
            answer = case.call_and_validate(checks=CHECKS, headers=headers)
            if (status := expected(name)) is not None:
                assert answer.status_code == status, name

    ask()


def test_the_document(document: Any) -> None:
    assert document["openapi"].startswith("3.1")
    assert document["servers"] == [{"url": "/api/v1"}]
    operations = {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert sorted(operations) == OPERATIONS
    assert sorted(needing_keys(document)) == OPERATIONS
    assert len({operation["operationId"] for operation in operations.values()}) == len(operations)
    for name, operation in operations.items():
        for status, answer in operation["responses"].items():
            if int(status) >= 400:
                assert list(answer["content"]) == ["application/problem+json"], (name, status)
            elif not name.endswith(("/logs", "/download")) and int(status) < 300 and status != "204":
                assert "example" in answer["content"]["application/json"], (name, status)
    assert list(operations["POST /jobs"]["requestBody"]["content"]) == ["application/json", "application/yaml"]


def test_examples_are_what_they_are_examples_of() -> None:
    from loray.schemas import access, resources
    from loray.schemas import resources as uploads
    from loray.spec import TrainSpec
    from serve_apps.api import examples

    for model, example in [
        (resources.AdapterResource, examples.ADAPTER),
        (resources.VersionResource, examples.VERSION),
        (resources.AliasResource, examples.ALIAS),
        (resources.TagResource, examples.TAG),
        (uploads.DownloadResource, examples.DOWNLOAD),
        (resources.BaseResource, examples.BASE),
        (resources.PlacementResource, examples.PLACEMENT),
        (resources.JobResource, examples.JOB),
        (access.KeyResource, examples.KEY),
        (access.NewKeyResource, examples.NEW_KEY),
        (access.TenantResource, examples.TENANT),
        (access.AuditResource, examples.AUDIT),
        (TrainSpec, examples.RECIPE),
    ]:
        shown = model.model_validate(example).model_dump(mode="json", exclude_unset=True)
        assert set(shown) == set(example)


def test_the_document_needs_no_database(tmp_path: Path) -> None:
    api = Api(tmp_path, "postgresql://nobody@127.0.0.1:1/none")
    assert api.http.get("/openapi.json").status_code == 200
    assert "swagger" in api.http.get("/docs").text
