"""Sampling sessions and samples."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from loray.errors import EngineError
from loray.schemas.tinker.proto import SampleResponse
from serve_apps.tinker import futures, sampling
from tests.fixtures.tinker import Unigram
from tests.serve_apps.tinker.asking import TOKENS, Client, asking


async def sampler_of(client: Client, number: int = 0, **fields: Any) -> str:
    made = await client.done("save_weights_for_sampler", client.next(sampling_session_seq_id=number, **fields))
    found: str = made["sampling_session_id"]
    return found


async def test_logprobs_of_the_trainer_are_those_of_the_sampler(front: Unigram) -> None:
    async with asking(front) as client:
        await client.begin()
        for _ in range(3):
            await client.forward_backward()
            await client.step()
        passed = (await client.forward_backward(forward_only=True)).loss_fn_outputs[0].fields["logprobs"].data
        sampler = await sampler_of(client)
        assert sampler == f"{client.session}:sample:0"
        message = await client.sample(sampler, prompt_logprobs=True, sampling_params={"max_tokens": 1})
        scored = np.frombuffer(message.prompt_logprobs, "<f4")
        assert np.isnan(scored[0])
        np.testing.assert_allclose(scored[1:], np.frombuffer(passed, "<f4"), atol=1e-6)
        assert front.gateways.calls[-1].holders == ("trainer-of-the-test",)


async def test_a_session_on_the_base_has_no_adapter(front: Unigram) -> None:
    async with asking(front) as client:
        await client.begin()
        body = {"session_id": client.session, "sampling_session_seq_id": 0, "base_model": "base"}
        sampler = (await client.ask("create_sampling_session", body))["sampling_session_id"]
        assert (await client.ask("create_sampling_session", body))["sampling_session_id"] == sampler
        message = await client.sample(sampler, num_samples=2, sampling_params={"max_tokens": 4, "stop": []})
        assert len(message.sequences) == 2
        assert front.gateways.calls[-1].adapter is None
        info = await client.http.get(f"/api/v1/samplers/{sampler}")
        assert info.json() == {"sampler_id": sampler, "base_model": "base", "model_path": None}
        joined = [await client.ask("join_sampling_session", {"sampling_session_id": sampler}) for _ in range(2)]
        assert [answer["client_counter"] for answer in joined] == [1, 2]


async def test_in_flight_sessions_have_the_newest_weights_when_a_request_starts(front: Unigram) -> None:
    async with asking(front) as client:
        await client.begin()
        first = await sampler_of(client, 0, kind="inflight")
        fixed = await sampler_of(client, 1)
        await client.forward_backward()
        await client.step()
        newest = await sampler_of(client, 2, kind="inflight")
        digests = []
        for i, sampler in enumerate((first, fixed, newest)):
            await client.sample(sampler, i, sampling_params={"max_tokens": 1})
            adapter = front.gateways.calls[-1].adapter
            assert adapter is not None
            digests.append(adapter.digest)
        assert digests[0] == digests[2] != digests[1]


async def test_sequences_have_ids_and_a_sample_sent_twice_is_one(front: Unigram) -> None:
    async with asking(front) as client:
        await client.begin()
        sampler = await sampler_of(client)
        body = {"sampling_session_id": sampler, "seq_id": 2_000_000_001, "prompt": {"chunks": [{"tokens": TOKENS}]}}
        body |= {"num_samples": 2, "sampling_params": {"max_tokens": 1}}
        made = await client.ask("asample", body)
        assert made["sample_sequence_ids"] == [f"{sampler}#2000000001.0", f"{sampler}#2000000001.1"]
        assert await client.ask("asample", body) == made
        assert len(SampleResponse.FromString((await client.result(made)).content).sequences) == 2
        assert len(front.gateways.calls) == 1
        assert (await client.post("asample", body | {"num_samples": 3})).status_code == 400


async def test_a_gateway_that_has_died_is_asked_again(front: Unigram, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_RETRY_S", 0.0)
    front.gateways.errors = [EngineError("gone"), RuntimeError("Ray's")]
    async with asking(front) as client:
        await client.begin()
        await client.sample(await sampler_of(client), sampling_params={"max_tokens": 1})
        assert len(front.gateways.calls) == 3


async def test_samples_are_cancelled_and_counted(front: Unigram, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MOST_OPEN", 1)
    front.gateways.hang = True
    async with asking(front) as client:
        await client.begin()
        sampler = await sampler_of(client)
        body = {"sampling_session_id": sampler, "seq_id": 0, "prompt": {"chunks": [{"tokens": TOKENS}]}}
        made = await client.ask("asample", body)
        refused = await client.post("asample", body | {"seq_id": 1})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        waiting = asyncio.create_task(client.result(made))
        await asyncio.sleep(0)
        assert (await client.post("cancel_future", {"request_id": made["request_id"]})).status_code == 200
        assert (await waiting).json()["category"] == "user"


async def test_a_sample_that_a_restarted_front_does_not_know_is_410(front: Unigram) -> None:
    async with asking(front) as client:
        await client.begin()
        sampler = await sampler_of(client)
        gone = await client.result({"request_id": f"{sampler}#77"})
        assert gone.status_code == 410


async def test_answers_are_forgotten_after_an_hour() -> None:
    at = 0.0
    kept = futures.Futures(lambda: at)

    async def work(_: futures.Future) -> dict[str, str]:
        return {}

    first = kept.start("a", "acme", 1, work)
    assert await first.wait(1.0) == {}
    at = futures.KEPT_S + 1
    kept.start("b", "acme", 1, work)
    assert kept.find("a", "acme") is None
    assert kept.find("b", "globex") is None


async def test_training_checkpoints_and_foreign_tokens_are_refused(front: Unigram) -> None:
    async with asking(front) as client:
        await client.begin()
        path = (await client.done("save_weights", client.next(path="one")))["path"]
        body = {"session_id": client.session, "sampling_session_seq_id": 4, "model_path": path}
        assert "save_weights_for_sampler" in (await client.post("create_sampling_session", body)).json()["detail"]
        sampler = await sampler_of(client)
        wrong = {"sampling_session_id": sampler, "seq_id": 0, "prompt": {"chunks": [{"tokens": [1 << 20]}]}}
        assert (await client.post("asample", wrong)).status_code == 400
