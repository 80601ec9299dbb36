"""Models, their operations and their futures."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import zstandard

from loray.catalog import Catalog
from loray.schemas.tinker.proto import ForwardBackwardOutput
from loray.spec import Limits, Principal
from serve_apps.accounting.usage import UsageWriter
from serve_apps.tinker.training import MAX_MODELS
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.tinker import Unigram, pass_body
from tests.serve_apps.tinker.asking import JSON, PROTOBUF, ROW, asking


async def test_a_loss_falls(front: Unigram) -> None:
    async with asking(front) as client:
        await client.begin()
        losses = []
        for _ in range(5):
            losses.append((await client.forward_backward()).metrics["loss:sum"])
            assert await client.step() == {"type": "optim_step", "metrics": {"grad_norm": 1.0}}
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0]


async def test_logprobs_of_all_positions_are_returned_also_of_weight_0(front: Unigram) -> None:
    async with asking(front) as client:
        await client.begin()
        body = pass_body(client.model, 1, ROW | {"weights": [0.0] * 5}, forward_only=True)
        response = await client.result(await client.ask("forward_backward", body))
        message = ForwardBackwardOutput.FromString(response.content)
        logprobs = np.frombuffer(message.loss_fn_outputs[0].fields["logprobs"].data, "<f4")
        np.testing.assert_allclose(logprobs, [-np.log(front.trainer.num_tokens)] * 5, rtol=1e-6)
        assert message.metrics["loss:sum"] == 0


async def test_a_request_sent_twice_is_the_same_future_and_with_another_body_it_is_400(front: Unigram) -> None:
    async with asking(front) as client:
        await client.begin()
        first = await client.ask("forward_backward", pass_body(client.model, 1, ROW))
        assert await client.ask("forward_backward", pass_body(client.model, 1, ROW)) == first
        assert first["request_id"] == f"{client.model}#1"
        other = await client.post("forward_backward", pass_body(client.model, 1, ROW, ROW))
        assert other.status_code == 400
        again = await client.create(0)
        assert again["model_id"] == client.model
        assert front.trainer.num_created == 1
        body = {"session_id": client.session, "model_seq_id": 0, "base_model": "base", "lora_config": {"rank": 4}}
        assert (await client.post("create_model", body)).status_code == 400


async def test_later_chunks_wait_for_the_first(front: Unigram) -> None:
    async with asking(front) as client:
        await client.begin()
        later = await client.ask("forward_backward", pass_body(client.model, 2, ROW))
        waiting = asyncio.create_task(client.result(later))
        await asyncio.sleep(0)
        await client.ask("forward_backward", pass_body(client.model, 1, ROW))
        assert (await waiting).status_code == 200


async def test_a_failed_operation_is_the_users_and_counts(front: Unigram) -> None:
    async with asking(front) as client:
        await client.begin()
        bad = pass_body(client.model, 1, ROW | {"target_tokens": [13] * 5})
        response = await client.result(await client.ask("forward_backward", bad))
        assert (response.status_code, response.json()) == (200, {"error": "13 is not trained", "category": "user"})
        client.seq = 1
        await client.forward_backward()


async def test_results_outlive_the_front(front: Unigram) -> None:
    async with asking(front) as client:
        await client.begin()
        request = await client.ask("forward_backward", pass_body(client.model, 1, ROW))
        saved = await client.ask("save_weights", {"model_id": client.model, "seq_id": 2, "path": "a"})
        sampler = {"model_id": client.model, "seq_id": 3, "sampling_session_seq_id": 0}
        made = await client.ask("save_weights_for_sampler", sampler)
    async with asking(front.restarted()) as client:
        assert (await client.result(request)).headers["content-type"] == "application/x-protobuf"
        path = {"type": "save_weights", "path": f"tinker://{request['model_id']}/weights/a"}
        assert (await client.result(saved)).json() == path
        assert (await client.result(made)).json()["sampling_session_id"].endswith(":sample:0")
        assert (await client.result({"request_id": f"{request['model_id']}#0"})).json()["type"] == "create_model"


async def test_a_model_without_a_slot_waits_and_says_so(front: Unigram) -> None:
    front.trainer.room = 0
    async with asking(front) as client:
        made = await client.ask("create_session", {"tags": [], "sdk_version": "0.38.0"})
        body = {"session_id": made["session_id"], "model_seq_id": 0, "base_model": "base"}
        request = await client.ask("create_model", body)
        future = front.front.futures.find(request["request_id"], "acme")
        assert future is not None
        while future.state == "active":
            await asyncio.sleep(0)
        assert (future.state, future.reason) == ("paused_capacity", "the trainer has no slot")
        front.trainer.room = 1
        assert (await client.result(request)).json()["type"] == "create_model"


async def test_a_result_that_does_not_come_is_408(front: Unigram) -> None:
    async def nothing(*_: object) -> None:
        return None

    async with asking(front) as client:
        await client.begin()
        request = await client.ask("forward_backward", pass_body(client.model, 1, ROW))
        front.trainer.result = nothing  # type: ignore[method-assign, assignment]
        response = await client.result(request)
        assert response.status_code == 408
        told = {"type": "try_again", "request_id": request["request_id"]}
        assert response.json() == told | {"queue_state": "active", "queue_state_reason": None}


async def test_bodies_may_be_compressed(front: Unigram) -> None:
    async with asking(front) as client:
        await client.begin()
        raw = zstandard.compress(pass_body(client.model, 1, ROW))
        headers = PROTOBUF | {"Content-Encoding": "zstd"}
        response = await client.http.post("/api/v1/forward_backward", content=raw, headers=headers)
        assert response.json()["request_id"] == f"{client.model}#1"
        huge = zstandard.compress(bytes(65 << 20))
        for content in (huge, b"no zstd"):
            response = await client.http.post("/api/v1/forward_backward", content=content, headers=headers)
            assert response.status_code == 400


async def test_models_of_a_tenant_are_counted(front: Unigram) -> None:
    own = Principal(tenant="acme", key_id="key-1", limits=Limits(max_jobs=1))
    async with asking(front, own) as client:
        await client.begin()
        body = {"session_id": client.session, "model_seq_id": 1, "base_model": "base"}
        response = await client.post("create_model", body)
        assert response.status_code == 403
        assert "max_jobs" in response.json()["detail"]
    assert MAX_MODELS == 8


async def test_tokens_are_charged_once_and_a_budget_ends(front: Unigram) -> None:
    own = Principal(tenant="acme", key_id="key-1", limits=Limits(max_budget=5))
    async with asking(front, own) as client:
        await client.begin()
        for _ in range(2):
            body = pass_body(client.model, 1, ROW)
            response = await client.post("forward_backward", body)
        assert response.status_code == 403  # and never 429, which would be tried again
        assert "budget of 5 tokens in 30d" in response.json()["detail"]
        (used,) = front.catalog.usage.sums(["key"], tenant="acme")
        assert (used.key_id, used.num_prompt_tokens, used.num_requests) == ("key-1", 5, 1)


async def test_usage_is_written_when_the_front_ends(front: Unigram, tmp_path: Path) -> None:
    usage = UsageWriter(lambda: Catalog(sqlite_catalog(tmp_path)), tmp_path)
    of = front.restarted(usage)
    async with asking(of) as client:
        await client.begin()
        await client.forward_backward()
        await of.front.close()
        (used,) = front.catalog.usage.sums(["key"], tenant="acme")
        assert (used.key_id, used.num_prompt_tokens, used.num_requests) == ("key-1", 5, 1)


async def test_what_the_protocol_lacks_is_in_user_metadata(front: Unigram) -> None:
    async with asking(front) as client:
        metadata = {"loray.method": "vera", "loray.name": "spoken", "count": 3}
        await client.begin(user_metadata=metadata)
        model = front.catalog.view(Principal(tenant="acme")).tinker.model(client.model)
        assert (model.adapter.method, model.name, model.metadata["count"]) == ("vera", "spoken", "3")
        for wrong in ({"loray.method": "ia3"}, {"loray.alpha": "x"}, {"loray.name": "a b"}):
            body = {"session_id": client.session, "model_seq_id": 9, "base_model": "base", "user_metadata": wrong}
            assert (await client.post("create_model", body)).status_code == 400


async def test_alpha_is_32_and_the_head_is_left_out(front: Unigram) -> None:
    async with asking(front) as client:
        await client.begin()
        info = await client.ask("get_info", {"model_id": client.model})
        assert (info["lora_rank"], info["model_data"]["tokenizer_id"]) == (8, "base")
        model = front.catalog.view(Principal(tenant="acme")).tinker.model(client.model)
        assert model.adapter.alpha == 32  # type: ignore[union-attr]
        only_head = {"rank": 8, "train_attn": False, "train_mlp": False}
        body = {"session_id": client.session, "model_seq_id": 1, "base_model": "base", "lora_config": only_head}
        response = await client.http.post("/api/v1/create_model", json=body, headers=JSON)
        assert (response.status_code, "head is frozen" in response.json()["detail"]) == (400, True)


async def test_an_unknown_base_names_those_that_are_served(front: Unigram) -> None:
    async with asking(front) as client:
        await client.begin()
        response = await client.post(
            "create_model", {"session_id": client.session, "model_seq_id": 1, "base_model": "Qwen/Qwen3-8B"}
        )
        assert response.status_code == 400
        assert "base, tiny-" in response.json()["detail"]
