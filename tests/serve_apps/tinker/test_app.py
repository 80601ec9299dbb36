"""The routes of Tinker's protocol: who may ask, and what no body can do."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given
from hypothesis import settings as given_with
from hypothesis import strategies as st

from loray.errors import SettingsError
from loray.settings import Settings
from loray.spec import Principal
from serve_apps.standalone.server import Site
from tests.fixtures.tinker import Unigram, pass_body
from tests.serve_apps.tinker.asking import JSON, ROW, asking

GLOBEX = Principal(tenant="globex", key_id="key-2")
POSTS = [
    "client/config",
    "create_session",
    "session_heartbeat",
    "create_model",
    "load_weights",
    "get_info",
    "forward_backward",
    "optim_step",
    "save_weights",
    "save_weights_for_sampler",
    "create_sampling_session",
    "join_sampling_session",
    "asample",
    "retrieve_future",
    "cancel_future",
    "weights_info",
    "sessions/x/finish",
]
FIELDS = [
    "session_id",
    "model_id",
    "seq_id",
    "model_seq_id",
    "path",
    "prompt",
    "sampling_session_id",
    "lora_config",
    "adam_params",
    "request_id",
    "reason",
    "optimizer",
    "base_model",
    "sdk_version",
    "tags",
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=6),
    max_leaves=8,
)


async def test_health_needs_no_key_and_capabilities_name_all_bases(front: Unigram) -> None:
    async with asking(front) as client:
        assert (await client.http.get("/api/v1/healthz")).json() == {"status": "ok"}
        models = (await client.http.get("/api/v1/get_server_capabilities")).json()["supported_models"]
        assert {"base"} < {model["model_name"] for model in models}
        assert all(model["trainable"] and model["sampleable"] for model in models)


async def test_flags_of_clients(front: Unigram) -> None:
    async with asking(front) as client:
        flags = await client.ask("client/config", {"sdk_version": "0.25.0", "later": 1})
        assert (flags["proto_compress_fwdbwd"], flags["pjwt_auth_enabled"]) == (True, False)
        assert (await client.ask("client/dynamic_config", {"sdk_version": "0.38.0"}))["sample_cancel_enabled"]
        assert await client.ask("telemetry", {"events": []}) == {"status": "accepted"}
        old = await client.post("client/config", {"sdk_version": "0.24.9"})
        assert (old.status_code, "0.25.0" in old.json()["detail"]) == (400, True)


async def test_a_newer_sdk_is_warned_and_the_head_is_told_of(front: Unigram) -> None:
    async with asking(front) as client:
        made = await client.ask("create_session", {"tags": [], "sdk_version": "0.41.0"})
        assert "0.38.0" in made["warning_message"]
        assert "train_unembed" in made["info_message"]


async def test_what_is_not_done_is_404_with_a_sentence(front: Unigram) -> None:
    async with asking(front) as client:
        for path in ("copy_weights", "retrieve_futures", "create_custom_loss"):
            response = await client.post(path, {})
            assert response.status_code == 404
            assert len(response.json()["detail"]) > 40


async def test_another_tenant_finds_nothing(front: Unigram) -> None:
    async with asking(front) as client, asking(front, GLOBEX) as other:
        await client.begin()
        saved = await client.ask("save_weights", client.next(path="one"))
        path = (await client.result(saved)).json()["path"]
        made = await client.done("save_weights_for_sampler", client.next(sampling_session_seq_id=0))
        sampler = made["sampling_session_id"]
        mine = await other.ask("create_session", {"tags": [], "sdk_version": "0.38.0"})
        sample = {"sampling_session_id": sampler, "seq_id": 0, "prompt": {"chunks": [{"tokens": [1]}]}}
        model = {"model_id": client.model}
        asked: dict[str, Any] = {
            "session_heartbeat": {"session_id": client.session},
            "create_model": {"session_id": client.session, "model_seq_id": 5, "base_model": "base"},
            "get_info": model,
            "forward_backward": pass_body(client.model, 9, ROW),
            "optim_step": model | {"seq_id": 9, "adam_params": {}},
            "save_weights": model | {"seq_id": 9},
            "save_weights_for_sampler": model | {"seq_id": 9, "path": "x"},
            "load_weights": {"session_id": mine["session_id"], "model_seq_id": 0, "path": path, "optimizer": True},
            "create_sampling_session": {
                "session_id": mine["session_id"],
                "sampling_session_seq_id": 0,
                "model_path": path.replace("/weights/", "/sampler_weights/"),
            },
            "join_sampling_session": {"sampling_session_id": sampler},
            "asample": sample,
            "retrieve_future": {"request_id": saved["request_id"]},
            "weights_info": {"tinker_path": path},
            f"sessions/{client.session}/finish": {"reason": {"type": "success"}},
        }
        statuses = {name: (await other.post(name, body)).status_code for name, body in asked.items()}
        assert statuses == dict.fromkeys(asked, 404)
        of_run = f"training_runs/{client.model}"
        for get in (f"sessions/{client.session}", f"samplers/{sampler}", of_run, f"{of_run}/checkpoints"):
            assert (await other.http.get(f"/api/v1/{get}")).status_code == 404, get
        assert (await other.http.delete(f"/api/v1/{of_run}/checkpoints/weights/one")).status_code == 404
        assert (await other.http.get("/api/v1/sessions")).json() == {"sessions": [mine["session_id"]]}
        assert (await other.http.get("/api/v1/training_runs")).json()["training_runs"] == []
        assert (await client.http.get("/api/v1/sessions")).json() == {"sessions": [client.session]}


async def test_a_session_lists_its_models_and_samplers(front: Unigram) -> None:
    async with asking(front) as client:
        await client.begin()
        await client.done("save_weights_for_sampler", client.next(sampling_session_seq_id=0))
        told = (await client.http.get(f"/api/v1/sessions/{client.session}")).json()
        assert told["training_run_ids"] == [client.model]
        assert told["sampler_ids"] == [f"{client.session}:sample:0"]


async def test_long_bodies_are_413(front: Unigram) -> None:
    async with asking(front) as client:
        response = await client.http.post("/api/v1/create_session", content=b" " * (5 << 20), headers=JSON)
        assert response.status_code == 413
        long = await client.post("forward_backward", b" " * (17 << 20))
        assert long.status_code == 413


@pytest.mark.parametrize("key", ["infer", "train"])
async def test_scopes(front: Unigram, key: str) -> None:
    principal = Principal(tenant="acme", scopes=frozenset({key}), key_id="key-1")
    async with asking(front) as client, asking(front, principal) as other:
        await client.begin()
        made = await client.done("save_weights_for_sampler", client.next(sampling_session_seq_id=0))
        sample = {
            "sampling_session_id": made["sampling_session_id"],
            "seq_id": 0,
            "prompt": {"chunks": [{"tokens": [1]}]},
        }
        sampled = await client.ask("asample", sample | {"sampling_params": {"max_tokens": 1}})
        of_training = (await other.result({"request_id": f"{client.model}#1"})).status_code
        of_sample = (await other.result(sampled)).status_code
        assert (of_training, of_sample) == ((403, 200) if key == "infer" else (200, 403))


async def test_a_server_alone_says_that_it_does_not_train() -> None:
    site = Site(FastAPI(), FastAPI(), lambda: None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(site), base_url="http://test") as client:
        response = await client.post("/tinker/api/v1/create_session", json={})
    assert (response.status_code, "`loray up`" in response.json()["detail"]) == (404, True)


def test_names_for_clients_are_settings() -> None:
    settings = Settings.from_env({"LORAY_TINKER_NAMES": '{"Qwen/Qwen3-8B": "smollm2"}'})
    assert settings.tinker_names == {"Qwen/Qwen3-8B": "smollm2"}
    assert Settings.from_env(settings.to_serving_env()).tinker_names == settings.tinker_names
    assert "LORAY_TINKER_NAMES" not in Settings.from_env({}).to_serving_env()
    for wrong in ("x", "[1]", '{"a": 1}'):
        with pytest.raises(SettingsError, match="LORAY_TINKER_NAMES"):
            Settings.from_env({"LORAY_TINKER_NAMES": wrong})


@given(path=st.sampled_from(POSTS), body=st.binary(max_size=60) | VALUES)
@given_with(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_is_an_internal_error(front: Unigram, path: str, body: Any) -> None:
    async def status() -> int:
        async with asking(front) as client:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            return (await client.http.post(f"/api/v1/{path}", content=raw, headers=JSON)).status_code

    assert asyncio.run(status()) < 500
