"""The gateway's OpenAPI document: generated requests get only answers that it describes, with keys and without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given
from schemathesis import GenerationMode

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.settings import Settings
from serve_apps.gateway.fine_tuning.jobs import FineTuning
from tests.fixtures.api import FakeJobs
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.gateway import HELLO, ScriptedEngines, file_storage, gateway_app, register
from tests.fixtures.keys import access_of
from tests.fixtures.openapi import (
    CHECKS,
    Headers,
    document_of,
    examples,
    expected,
    headers_of_each_kind,
    needing_keys,
)

OPERATIONS = sorted(
    f"{method} {path}"
    for method, paths in {
        "DELETE": ("/v1/files/{file_id}", "/v1/responses/{id}"),
        "GET": (
            "/health",
            "/metrics",
            "/ping",
            "/status",
            "/v1/batches",
            "/v1/batches/{batch_id}",
            "/v1/files",
            "/v1/files/{file_id}",
            "/v1/files/{file_id}/content",
            "/v1/fine_tuning/jobs",
            "/v1/fine_tuning/jobs/{id}",
            "/v1/fine_tuning/jobs/{id}/checkpoints",
            "/v1/fine_tuning/jobs/{id}/events",
            "/v1/models",
            "/v1/models/{model}",
            "/v1/responses/{id}",
            "/v1/responses/{id}/input_items",
            "/version",
        ),
        "POST": (
            "/detokenize",
            "/invocations",
            "/ping",
            "/tokenize",
            "/v1/batches",
            "/v1/batches/{batch_id}/cancel",
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/embeddings",
            "/v1/files",
            "/v1/fine_tuning/jobs",
            "/v1/fine_tuning/jobs/{id}/cancel",
            "/v1/load_lora_adapter",
            "/v1/messages",
            "/v1/messages/count_tokens",
            "/v1/responses",
            "/v1/responses/{id}/cancel",
            "/v1/unload_lora_adapter",
        ),
    }.items()
    for path in paths
)
OPEN = ("/health", "/ping", "/version")
TAKE_NOTHING = (
    "/health",
    "/ping",
    "/version",
    "/metrics",
    "/status",
    "/{model}",
    "/{id}",
    "/cancel",
    "/input_items",
)  # that could be wrong
CASES = [
    pytest.param(operation, mode, id=f"{mode.value} {operation}")
    for operation in OPERATIONS
    for mode in GenerationMode
    if mode == GenerationMode.POSITIVE or not operation.endswith(TAKE_NOTHING)
]


@pytest.fixture(scope="module")
def app(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    url = sqlite_catalog(tmp_path_factory.mktemp("catalog"))
    with closing(Catalog(url)) as catalog:
        register(catalog, "tone", base.fingerprint)
    files = file_storage(url, tmp_path_factory.mktemp("files"))
    tuning = FineTuning(FakeJobs(), Settings.from_env())
    return gateway_app(base, url, ScriptedEngines(HELLO), pooling="last", files=files, tuning=tuning)


@pytest.fixture(scope="module")
def with_keys(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, dict[str, Headers]]]:
    """An application that others reach, and the headers of its callers."""
    url = sqlite_catalog(tmp_path_factory.mktemp("catalog"))
    with closing(Catalog(url)) as catalog:
        register(catalog, "tone", base.fingerprint)
        access = access_of(url, host="0.0.0.0")
        files = file_storage(url, tmp_path_factory.mktemp("files"))
        tuning, engines = FineTuning(FakeJobs(), Settings.from_env()), ScriptedEngines(HELLO)
        app = gateway_app(base, url, engines, pooling="last", access=access, files=files, tuning=tuning)
        yield app, headers_of_each_kind(catalog)
        access.close()


def test_the_document_has_every_route(app: Any) -> None:
    document = app.openapi()
    found = [f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods]
    assert sorted(found) == OPERATIONS
    assert needing_keys(document) == {operation for operation in OPERATIONS if not operation.endswith(OPEN)}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert {"200"} < operation["responses"].keys()
            assert ("401" in operation["responses"]) == (path not in OPEN), path
            for status, answer in operation["responses"].items():
                if status != "200":
                    shown = answer["content"]["application/json"]["schema"]
                    form = "ErrorAnswer" if path.startswith("/v1/messages") else "ErrorBody"
                    assert shown == {"$ref": f"#/components/schemas/{form}"}, (path, status)
    chat = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in document["components"]["schemas"][chat["$ref"].rpartition("/")[2]]["properties"]
    assert "x-ratelimit-remaining-tokens" in document["paths"]["/v1/responses"]["post"]["responses"]["429"]["headers"]


def cases_of(app: Any, operation: str, mode: GenerationMode) -> Any:
    method, path = operation.split()
    return document_of(app, "/openapi.json")[path][method].as_strategy(generation_mode=mode)


def known_names(case: Any, base: BaseModel) -> None:
    """So that the request gets further than to its name."""
    if isinstance(case.path_parameters, dict) and "model" in case.path_parameters:
        case.path_parameters["model"] = "tone"
    for name in ("model", "lora_name"):
        if isinstance(case.body, dict) and name in case.body:
            case.body[name] = base.name if name == "model" else "tone"


@pytest.mark.parametrize(("operation", "mode"), CASES)
def test_every_answer_is_described(app: Any, base: BaseModel, operation: str, mode: GenerationMode) -> None:
    @given(case=cases_of(app, operation, mode))
    @examples(10 if operation.startswith("POST") and operation != "POST /ping" else 3)
    def ask(case: Any) -> None:
        if mode is GenerationMode.POSITIVE:
            known_names(case, base)
        case.call_and_validate(checks=CHECKS)

    ask()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_answer_to_a_key_is_described(
    with_keys: tuple[Any, dict[str, Headers]], base: BaseModel, operation: str
) -> None:
    app, callers = with_keys
    is_open = operation.endswith(OPEN)
    statuses: dict[str, set[int]] = {name: set() for name in callers}

    @given(case=cases_of(app, operation, GenerationMode.POSITIVE))
    @examples(2)
    def ask(case: Any) -> None:
        known_names(case, base)
        for name, headers in callers.items():
            answer = case.call_and_validate(checks=CHECKS, headers=headers)
            statuses[name].add(answer.status_code)

    ask()
    for name, found in statuses.items():
        if is_open:
            assert found == {200}
        elif (status := expected(name)) is not None:
            assert found == {status}, name
    if operation.endswith(("completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/invocations")):
        assert statuses["limited"] == {429}
