"""/tokenize and /detokenize, in vLLM's shapes, and its routes that load adapters."""

from __future__ import annotations

from typing import Any

import pytest

from loray import __version__
from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from tests.serve_apps.gateway.scripted import ScriptedEngines, register
from tests.serve_apps.gateway.test_gateway import CHAT, HELLO, error_of


def test_a_text_and_back(client_of: Any, base: BaseModel) -> None:
    with client_of(ScriptedEngines()) as client:
        body = client.post("/tokenize", json={"model": base.name, "prompt": "aé"}).json()
        assert body == {"count": 3, "max_model_len": 512, "tokens": body["tokens"]}
        assert client.post("/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": "aé"}
        shown = client.post("/tokenize", json={"prompt": "aé", "return_token_strs": True}).json()
        assert shown["token_strs"] == ["a", "Ã", "©"]
        assert client.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
        assert (
            client.post("/tokenize", json={"prompt": "x" * 100_000}).json()["count"] == 100_000
        )  # to measure is allowed
        long = "naïve → " * 3000
        ids = client.post("/tokenize", json={"prompt": long}).json()["tokens"]
        assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": long}  # in pieces
        assert client.post("/detokenize", json={"tokens": [258]}).json() == {"prompt": "<|im_end|>"}


def test_a_chat_has_the_tokens_that_its_completion_has(client_of: Any, base: BaseModel) -> None:
    engines = ScriptedEngines(HELLO)
    with client_of(engines) as client:
        client.post("/v1/chat/completions", json={"model": base.name, "messages": CHAT})
        body = client.post("/tokenize", json={"messages": CHAT}).json()
    assert body["tokens"] == list(engines.requests[0].prompt_ids)


def test_an_adapter_has_its_own_length(client_of: Any, base: BaseModel, catalog: Catalog) -> None:
    register(catalog, "tone", base.fingerprint, context_length=256)
    with client_of(ScriptedEngines()) as client:
        assert client.post("/tokenize", json={"model": "tone", "prompt": "a"}).json()["max_model_len"] == 256
        assert error_of(client.post("/tokenize", json={"model": "nobody", "prompt": "a"}), 404)["param"] == "model"


def test_what_is_refused(client_of: Any) -> None:
    with client_of(ScriptedEngines()) as client:
        for path, body, param in [
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": "a", "messages": CHAT}, "prompt"),
            ("/tokenize", {"messages": []}, "messages"),
            ("/tokenize", {"prompt": [1]}, "prompt"),
            ("/detokenize", {"tokens": [259]}, "tokens"),
            ("/detokenize", {"tokens": [-1]}, "tokens"),
            ("/detokenize", {"tokens": "a"}, "tokens"),
            ("/v1/load_lora_adapter", {}, "lora_name"),
        ]:
            assert error_of(client.post(path, json=body), 400)["param"] == param, (path, body)


def test_adapters_are_those_of_the_catalog(client_of: Any, base: BaseModel, catalog: Catalog) -> None:
    register(catalog, "tone", base.fingerprint)
    with client_of(ScriptedEngines()) as client:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            response = client.post(path, json={"lora_name": "tone"})
            assert response.status_code == 200
            assert response.text.startswith("Success: LoRA adapter 'tone'")
            assert error_of(client.post(path, json={"lora_name": "nobody"}), 404)["code"] == "model_not_found"
            assert error_of(client.post(path, json={"lora_name": base.name}), 400)["param"] == "lora_name"
        body = {"lora_name": "tone", "lora_path": "tone", "load_inplace": True}
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
        error = error_of(client.post("/v1/load_lora_adapter", json=body | {"lora_path": "/models/tone"}), 400)
        assert "loray adapters import" in error["message"]


def test_ping_and_version(client_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_apps.gateway.bases.FRESH_S", 0.0)
    engines = ScriptedEngines()
    with client_of(engines) as client:
        assert client.get("/version").json() == {"version": __version__}
        assert [client.get("/ping").status_code, client.post("/ping").status_code] == [200, 200]
        engines.replicas = []
        assert [client.get("/ping").status_code, client.post("/ping").status_code] == [503, 503]
