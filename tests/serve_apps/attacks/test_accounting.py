"""Nothing that costs is free: many answers to one request, refused requests, counted tokens, open answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from loray.bases.registry import BaseModel
from loray.policy.quotas import OPEN_ENDED_TOKENS
from loray.spec import TokenDelta
from tests.fixtures.accounts import Front
from tests.fixtures.gateway import ScriptedEngines, delta

CONTEXT = 512  # of the base


@pytest.fixture
def front(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> Front:
    return Front(tiny_base(), tmp_path)


@pytest.mark.parametrize(("num_prompts", "n", "logprobs"), [*product((1, 3), (1, 4), (None, 0))])
def test_a_prompt_counts_as_often_as_it_is_computed(
    front: Front, num_prompts: int, n: int, logprobs: int | None
) -> None:
    body = {"model": front.base.name, "prompt": [[65] * 100] * num_prompts, "n": n, "max_tokens": 1}
    body |= {} if logprobs is None else {"prompt_logprobs": logprobs}
    num_sequences = num_prompts * n
    num_computed = 100 * (num_prompts if logprobs is None else num_sequences)

    async def run() -> None:
        engines = ScriptedEngines([delta("a", "length")])
        limits = {"rpm_limit": 10, "tpm_limit": 10_000, "max_parallel_requests": num_sequences}
        async with front.asking(engines, **limits) as client:
            answer = await client.post("/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert int(answer.headers["x-ratelimit-remaining-requests"]) == 10 - num_prompts
            assert int(answer.headers["x-ratelimit-remaining-tokens"]) == 10_000 - num_computed - num_sequences
            assert answer.json()["usage"]["prompt_tokens"] == 100 * num_prompts
        if num_sequences > 1:
            async with front.asking(engines, max_parallel_requests=num_sequences - 1) as client:
                assert (await client.post("/completions", json=body)).status_code == 429

    asyncio.run(run())
    (event,) = front.events
    assert (event.num_prompt_tokens, event.num_output_tokens) == (num_computed, num_sequences)


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/detokenize"])
def test_requests_that_generate_nothing_are_counted(front: Front, path: str) -> None:
    name = front.base.name
    body, status = {
        "/v1/completions": ({"model": name, "prompt": [65] * CONTEXT}, 400),  # one token too long
        "/tokenize": ({"model": name, "prompt": "abc"}, 200),
        "/detokenize": ({"model": name, "tokens": [65, 66]}, 200),
    }[path]

    async def run() -> None:
        async with front.asking(ScriptedEngines(), rpm_limit=10) as client:
            answers = [(await client.post(f"http://test{path}", json=body)).status_code for _ in range(15)]
        assert answers == [status] * 10 + [429] * 5

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "num_tokens"), [("/v1/completions", CONTEXT), ("/tokenize", 100), ("/detokenize", 100)]
)
def test_tokens_without_an_answer_count_in_those_of_a_minute(front: Front, path: str, num_tokens: int) -> None:
    name = front.base.name
    body = {
        "/v1/completions": {"model": name, "prompt": "a" * CONTEXT},
        "/tokenize": {"model": name, "prompt": "a" * 400},
        "/detokenize": {"model": name, "tokens": [65] * 400},
    }[path]

    async def run() -> None:
        engines = ScriptedEngines([delta("a", "stop")])
        async with front.asking(engines, tpm_limit=10_000, max_budget=10_000) as client:
            await client.post(f"http://test{path}", json=body)
            answer = await client.post("/completions", json={"model": name, "prompt": [65], "max_tokens": 1})
            remaining = int(answer.headers["x-ratelimit-remaining-tokens"])
            assert remaining in range(10_000 - 2 - num_tokens, 10_000 - 2 - num_tokens + 100)  # some has come back

    asyncio.run(run())


def test_answers_without_a_limit_end_where_the_budget_does(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_apps.accounting.accounts.OPEN_ENDED_TOKENS", 20)
    assert OPEN_ENDED_TOKENS > 20
    budget, num_requests = 100, 4

    async def run() -> list[dict[str, object]]:
        script = [TokenDelta((65,)) for _ in range(400)]
        async with front.asking(ScriptedEngines(script, hang=True), max_budget=budget) as client:
            body = {"model": front.base.name, "messages": [{"role": "user", "content": "a"}]}
            asked = [client.post("/chat/completions", json=body) for _ in range(num_requests)]
            return [answer.json()["choices"][0] for answer in await asyncio.gather(*asked) if answer.is_success]

    choices = asyncio.run(run())
    assert {(c["finish_reason"], c["stop_reason"]) for c in choices} == {("length", "quota")}
    used = sum(event.num_prompt_tokens + event.num_output_tokens for event in front.events)
    assert budget - 20 < used <= budget
