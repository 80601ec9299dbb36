"""The gateway's OpenAPI document: whatever is generated from it gets an answer that is not 500."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from tests.serve_apps.gateway.scripted import ScriptedEngines, catalog_url, gateway_app, register
from tests.serve_apps.gateway.test_gateway import HELLO

OPERATIONS = [
    "GET /health",
    "GET /metrics",
    "GET /ping",
    "GET /status",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "GET /version",
    "POST /detokenize",
    "POST /ping",
    "POST /tokenize",
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/load_lora_adapter",
    "POST /v1/responses",
    "POST /v1/unload_lora_adapter",
]


@pytest.fixture(scope="module")
def app(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    url = catalog_url(tmp_path_factory.mktemp("catalog"))
    register(Catalog(url), "tone", base.fingerprint)
    return gateway_app(base, url, ScriptedEngines(HELLO))


def test_the_document_has_every_route(app: Any) -> None:
    document = app.openapi()
    found = [f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods]
    assert sorted(found) == OPERATIONS


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("operation", [op for op in OPERATIONS if op.startswith("POST") and op != "POST /ping"])
def test_no_request_is_a_server_error(app: Any, base: BaseModel, operation: str, mode: GenerationMode) -> None:
    method, path = operation.split()
    cases = schemathesis.openapi.from_asgi("/openapi.json", app)[path][method].as_strategy(generation_mode=mode)

    @given(case=cases)
    @settings(max_examples=50, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def ask(case: Any) -> None:
        for name in ("model", "lora_name"):  # so that the request gets further than to its name
            if isinstance(case.body, dict) and name in case.body and mode is GenerationMode.POSITIVE:
                case.body[name] = base.name if name == "model" else "tone"
        case.call_and_validate(checks=[checks.not_a_server_error])

    ask()
