"""The OpenAPI document of the catalog's API: generated requests get only responses that it describes."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from pydantic import BaseModel
from schemathesis import GenerationMode
from starlette.routing import Match

from loray.errors import AdapterNotFound
from loray.policy.auth import KeyRing
from loray.schemas import access, resources
from loray.spec import Principal, TrainSpec
from tests.cli.documented import blocks
from tests.conftest import REPOSITORY
from tests.fixtures.api import Api, submit
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.keys import access_of
from tests.fixtures.openapi import (
    CHECKS,
    NEGATIVE_CHECKS,
    Headers,
    document_of,
    expected,
    headers_of_each_kind,
    needing_keys,
)
from tests.fixtures.openapi import examples as num_examples
from tests.fixtures.versions import BASE, publish

TAKE_NOTHING = {"GET /bases", "GET /keys/self", "GET /tenants"}  # that could be wrong
KNOWN = {"name": "tone", "alias": "prod", "version": 1, "id": "job-1", "key": "team"}
KEY = "a key of the deployment itself, long enough"
HEADERS = {"Authorization": f"Bearer {KEY}"}
GOLDEN = json.loads((REPOSITORY / "tests" / "golden" / "openapi-catalog.json").read_text())
OPERATIONS = sorted(f"{method.upper()} {path}" for path, methods in GOLDEN["paths"].items() for method in methods)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    home = tmp_path_factory.mktemp("home")
    url = sqlite_catalog(home)
    ring = KeyRing(static={hashlib.sha256(KEY.encode()).digest(): Principal(key_id="deployment")})
    api = Api(home, url, access_of(url, host="0.0.0.0", ring=ring))
    api.http.headers.update(HEADERS)
    api.catalog.bases.add("smollm2", BASE)
    publish(api.catalog, "tone", 1, 2, aliases=("prod",))
    api.catalog.tags.set("tone", "team", "support")
    submit(api, "job-1")
    restore(api)
    yield api
    api.close()


@pytest.fixture(scope="module")
def document(api: Api) -> Any:
    return api.http.get("/openapi.json").json()


@pytest.fixture(scope="module")
def requests(api: Api) -> Any:
    """Schemathesis' view of the document, which takes a while to make."""
    return document_of(api.app, "/api/v1/openapi.json")


CASES = [
    pytest.param(operation, mode, id=f"{mode.value} {operation}")
    for operation in OPERATIONS
    for mode in GenerationMode
    if mode == GenerationMode.POSITIVE or operation not in TAKE_NOTHING
]


@pytest.fixture(scope="module")
def callers(api: Api) -> dict[str, Headers]:
    return headers_of_each_kind(api.catalog)


def cases_of(requests: Any, operation: str, mode: GenerationMode) -> Any:
    method, path = operation.split()
    return requests[path][method].as_strategy(generation_mode=mode)


def restore(api: Api) -> None:
    """There is an alias that can be rolled back."""
    for deleted in (None, 1):
        with suppress(AdapterNotFound):
            api.catalog.removal.restore("tone", deleted)
    for version in (1, 2):
        api.catalog.aliases.move("tone", "prod", version)


def ask(api: Api, case: Any, checks: Any, headers: Headers) -> int:
    """The status of the answer. What a change has changed is as it was afterwards, for the next example."""
    answer = case.call_and_validate(checks=checks, headers=headers)
    if case.method != "GET" and answer.status_code < 300:
        restore(api)
    return int(answer.status_code)


@pytest.mark.parametrize(("operation", "mode"), CASES)
def test_every_answer_is_described(api: Api, requests: Any, operation: str, mode: GenerationMode) -> None:
    """`mode`: valid requests for existing resources, or invalid ones, which must be refused."""

    @given(case=cases_of(requests, operation, mode))
    @num_examples(4 if mode == GenerationMode.POSITIVE else 6)  # there are more ways to be wrong than to be right
    def check(case: Any) -> None:
        if mode == GenerationMode.POSITIVE:
            case.path_parameters |= {name: KNOWN[name] for name in case.path_parameters}
        ask(api, case, NEGATIVE_CHECKS, HEADERS)

    check()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_answer_to_a_key_is_described(
    api: Api, requests: Any, callers: dict[str, Headers], operation: str
) -> None:
    @given(case=cases_of(requests, operation, GenerationMode.POSITIVE))
    @num_examples(1)
    def check(case: Any) -> None:
        case.path_parameters |= {name: KNOWN[name] for name in case.path_parameters}
        for name, headers in callers.items():
            status = ask(api, case, CHECKS, headers)
            assert expected(name) in (None, status), name

    check()


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


BODIES = [
    model
    for module in (access, resources)
    for model in vars(module).values()
    if isinstance(model, type) and issubclass(model, BaseModel) and re.fullmatch(r"\w+Resource", model.__name__)
]


@pytest.mark.parametrize("model", BODIES, ids=lambda model: model.__name__)
def test_examples_are_what_they_are_examples_of(model: type[BaseModel]) -> None:
    example = resources.example_of(model)
    assert example
    assert set(model.model_validate(example).model_dump(mode="json", exclude_unset=True)) == set(example)


def test_the_recipe_of_the_examples_is_one() -> None:
    assert TrainSpec.parse(resources.RECIPE_EXAMPLE, source="the example").name == "tone"


_PATH = re.compile(r"/api/v1(/[^?\s]*)")


def test_every_route_that_is_asked_is_there(api: Api) -> None:
    found = set(asked())
    assert len(found) > 5
    assert not [request for request in found if not is_known(api, *request)]
    assert not is_known(api, "GET", "/adapters/tone/nothing")


def is_known(api: Api, method: str, path: str) -> bool:
    scope = {"type": "http", "method": method, "path": path}
    return any(route.matches(scope)[0] is Match.FULL for route in api.unmounted.routes)


def asked() -> Iterator[tuple[str, str]]:
    """Method and path of each request, without /api/v1."""
    for page in (REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")):
        for block in blocks(page.read_text(encoding="utf-8")):
            for line in block.text.replace("\\\n", " ").splitlines():
                _, curl, after = line.partition("curl ")
                path = _PATH.search(after)
                if curl and path and block.language != "text":
                    named = path[1].strip("\"'")
                    yield _method(after), f"{named}file" if named.endswith("/") else named  # curl adds the file's name


def _method(after: str) -> str:
    words = shlex.split(after.partition("  #")[0].rstrip(")"), posix=True)
    if "-X" in words:
        return words[words.index("-X") + 1]
    return "PUT" if "-T" in words else "POST" if {"-d", "--data", "--data-binary"} & set(words) else "GET"
