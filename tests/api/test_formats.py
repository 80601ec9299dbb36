"""Responses and chunks have exactly OpenAI's fields, and OpenAI's client can read them."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from loray.schemas.openai import ChatFormat, CompletionFormat, Usage
from loray.schemas.openai.formats import Choice, usage_of
from loray.schemas.status import EngineStatus, ReplicaStatus, total


class Logprob(NamedTuple):
    token_id: int
    token: str
    logprob: float | None
    top: tuple[tuple[int, str, float], ...] = ()
    rank: int = 1


class Delta(NamedTuple):
    text: str
    logprobs: tuple[Logprob, ...] | None = None
    finish_reason: Any = None
    num_prompt_tokens: int = 3
    num_output_tokens: int = 1
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[Logprob, ...] | None = None
    token_ids: tuple[int, ...] = ()
    tool_calls: tuple[Any, ...] = ()
    stop_reason: str | int | None = None


A = Logprob(1, "é", -0.5, ((1, "é", -0.5), (2, "b", float("-inf"))))
B = Logprob(2, "bc", -1.0, ((1, "é", -0.5),))


def collected(*deltas: Delta) -> Choice:
    choice = Choice()
    for d in deltas:
        choice.add(d)
    return choice


def fmt(cls: Any, **more: Any) -> Any:
    return cls(id="x-1", created=7, model="tone@3", fingerprint="f", **more)


def test_completion_is_openais() -> None:
    choice = collected(Delta("é", (A,)), Delta("bc", (B,), "length", 3, 2))
    body = json.loads(
        fmt(CompletionFormat).whole([choice, collected(Delta("", None, "stop"))], Usage.of(3, 3)).to_json()
    )
    assert body == {
        "id": "x-1",
        "object": "text_completion",
        "created": 7,
        "model": "tone@3",
        "system_fingerprint": "f",
        "choices": [
            {
                "index": 0,
                "text": "ébc",
                "logprobs": {
                    "text_offset": [0, 1],
                    "token_logprobs": [-0.5, -1.0],
                    "tokens": ["é", "bc"],
                    "top_logprobs": [{"é": -0.5, "b": -9999.0}, {"é": -0.5, "bc": -1.0}],
                },
                "finish_reason": "length",
            },
            {"index": 1, "text": "", "logprobs": None, "finish_reason": "stop"},
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
    }
    assert Completion.model_validate(body, strict=True).choices[0].text == "ébc"


FIRST = Logprob(5, "x", None, (), 0)
SECOND = Logprob(9, "y", -3.0, ((1, "é", -0.5), (2, "b", -2.0)), 7)


def test_an_echoed_prompt_begins_without_a_logprob() -> None:
    body = fmt(CompletionFormat).whole([collected(Delta("xy", (FIRST, SECOND), "length"))], Usage.of(2, 0))
    logprobs = json.loads(body.to_json())["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [None, -3.0]
    assert logprobs["top_logprobs"] == [None, {"é": -0.5, "b": -2.0, "y": -3.0}]
    assert logprobs["text_offset"] == [0, 1]


@pytest.mark.parametrize("cls", [CompletionFormat, ChatFormat])
def test_prompt_logprobs_are_vllms(cls: Any) -> None:
    asked = Delta("a", None, "length", prompt_logprobs=(FIRST, SECOND))
    body = json.loads(fmt(cls).whole([collected(asked)], Usage.of(2, 1)).to_json())
    assert (body if cls is ChatFormat else body["choices"][0])["prompt_logprobs"] == [
        None,
        {
            "9": {"logprob": -3.0, "rank": 7, "decoded_token": "y"},
            "1": {"logprob": -0.5, "rank": 1, "decoded_token": "é"},
            "2": {"logprob": -2.0, "rank": 2, "decoded_token": "b"},
        },
    ]
    body = json.loads(fmt(cls).whole([collected(Delta("a", None, "length"))], Usage.of(2, 1)).to_json())
    assert "prompt_logprobs" not in (body if cls is ChatFormat else body["choices"][0])


def test_text_offsets_continue_over_chunks() -> None:
    answer = fmt(CompletionFormat)
    assert answer.opening(0) is None
    bodies = [json.loads(answer.chunk(0, d).to_json()) for d in (Delta("é", (A,)), Delta("bc", (B,), "stop"))]
    assert [b["choices"][0]["logprobs"]["text_offset"] for b in bodies] == [[0], [1]]
    assert [b["choices"][0]["finish_reason"] for b in bodies] == [None, "stop"]
    assert "usage" not in bodies[0]


@pytest.mark.parametrize("cls", [CompletionFormat, ChatFormat])
def test_usage_of_a_stream_is_its_last_chunk(cls: Any) -> None:
    answer = fmt(cls, include_usage=True)
    assert json.loads(answer.chunk(0, Delta("a")).to_json())["usage"] is None
    last = json.loads(answer.usage_chunk(Usage.of(3, 4)).to_json())
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def test_chat_completion_is_openais() -> None:
    body = json.loads(fmt(ChatFormat).whole([collected(Delta("é", (A,), "stop"))], Usage.of(3, 1)).to_json())
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "é", "refusal": None},
            "logprobs": {
                "content": [
                    {
                        "token": "é",
                        "logprob": -0.5,
                        "bytes": [195, 169],
                        "top_logprobs": [
                            {"token": "é", "logprob": -0.5, "bytes": [195, 169]},
                            {"token": "b", "logprob": -9999.0, "bytes": [98]},
                        ],
                    }
                ],
                "refusal": None,
            },
            "finish_reason": "stop",
        }
    ]
    assert ChatCompletion.model_validate(body, strict=True).choices[0].message.content == "é"


def test_chat_chunks_open_with_the_role_and_end_with_an_empty_delta() -> None:
    answer = fmt(ChatFormat)
    bodies = [answer.opening(1), answer.chunk(1, Delta("a")), answer.chunk(1, Delta("", None, "stop"))]
    choices = [json.loads(b.to_json())["choices"][0] for b in bodies]
    assert [c["delta"] for c in choices] == [{"role": "assistant", "content": ""}, {"content": "a"}, {}]
    assert choices[0] == {"index": 1, "delta": choices[0]["delta"], "logprobs": None, "finish_reason": None}
    assert choices[2]["finish_reason"] == "stop"
    for b in bodies:
        ChatCompletionChunk.model_validate_json(b.to_json(), strict=True)


def test_a_prompt_counts_once_however_many_choices() -> None:
    choices = [collected(Delta("", None, "stop", n, 2)) for n in (3, 3, 5, 5)]
    assert usage_of(choices, 2) == Usage.of(8, 8)


def test_usage_counts_cached_tokens_once_per_prompt() -> None:
    choices = [collected(Delta("", None, "stop", 40, 2, cached)) for cached in (32, 39, 16, 0)]
    usage = json.loads(usage_of(choices, 2).to_json())
    assert usage["prompt_tokens_details"] == {"cached_tokens": 48}
    assert usage["prompt_tokens"] == 80


def test_a_choice_grows_without_copying_what_it_has() -> None:
    choice = collected(Delta("é", (A,)))
    logprobs = choice.logprobs
    choice.add(Delta("bc", (B,)))
    assert choice.logprobs is logprobs
    assert (choice.text, logprobs) == ("ébc", [A, B])


def test_status_totals() -> None:
    common = {"node": "n", "pid": 1, "uptime_s": 1.0}
    replicas = (
        ReplicaStatus(replica="a", num_running=1, blocks={"free": 2}, max_adapters_in_step=3, **common),
        ReplicaStatus(replica="b", num_running=2, blocks={"free": 1, "kv": 4}, max_adapters_in_step=1, **common),
    )
    assert total(replicas) == EngineStatus(num_running=3, blocks={"free": 3, "kv": 4}, max_adapters_in_step=3)
    assert total(()) == EngineStatus()


def test_the_hit_rate_is_of_requests_for_adapters() -> None:
    common = {"node": "n", "pid": 1, "uptime_s": 1.0}
    replicas = (
        ReplicaStatus(replica="a", num_pool_hits=3, num_host_hits=1, **common),
        ReplicaStatus(replica="b", num_misses=2, **common),
    )
    assert [r.hit_rate for r in replicas] == [0.75, 0.0]
    assert total(replicas).model_dump()["hit_rate"] == 0.5
    assert EngineStatus().hit_rate is None
