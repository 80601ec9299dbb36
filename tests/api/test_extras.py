"""vLLM's additions to answers: token ids, what stopped an answer, usage in every chunk."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loray.schemas.openai import ChatFormat, CompletionFormat, Usage
from loray.schemas.openai.formats import NO_EXTRAS, Choice, Chunks, Extras
from loray.spec import Delta

PROMPTS = ((1, 2, 3), (4, 5))
DELTAS = [
    Delta("a", (7,), None, None, 3, 1),
    Delta("", (8,), None, None, 3, 2),
    Delta("b", (9,), None, "stop", 3, 3, stop_reason="x"),
]


def chunks_of(cls: Any, extras: Extras, index: int = 0, *, include_usage: bool = False) -> list[Any]:
    chunks = Chunks(cls("id", 1, "m", "f", include_usage, extras), after="\n")
    return [json.loads(line) for d in DELTAS for line in chunks.push(index, d).splitlines()]


def whole_of(cls: Any, extras: Extras) -> Any:
    choices = [Choice(), Choice()]
    for d in DELTAS:
        choices[0].add(d)
        choices[1].add(d)
    return json.loads(cls("id", 1, "m", "f", False, extras).whole(choices, Usage.of(3, 3)).to_json())


def test_token_ids_of_completions() -> None:
    extras = Extras(PROMPTS, token_ids=True)
    choices = whole_of(CompletionFormat, extras)["choices"]
    assert [c["prompt_token_ids"] for c in choices] == [[1, 2, 3], [4, 5]]
    assert [c["token_ids"] for c in choices] == [[7, 8, 9]] * 2
    streamed = [c["choices"][0] for c in chunks_of(CompletionFormat, extras, 1)]
    assert [c["token_ids"] for c in streamed] == [[7], [8], [9]]  # also those whose text comes later
    assert [c.get("prompt_token_ids") for c in streamed] == [[4, 5], None, None]


def test_token_ids_of_chats() -> None:
    extras = Extras(PROMPTS[:1] * 2, token_ids=True)
    body = whole_of(ChatFormat, extras)
    assert body["prompt_token_ids"] == [1, 2, 3]
    assert [c["token_ids"] for c in body["choices"]] == [[7, 8, 9]] * 2
    opening, *streamed = chunks_of(ChatFormat, extras)
    assert opening["prompt_token_ids"] == [1, 2, 3]
    assert [c["choices"][0]["token_ids"] for c in streamed] == [[7], [8], [9]]


@pytest.mark.parametrize("cls", [CompletionFormat, ChatFormat])
def test_what_stopped_an_answer(cls: Any) -> None:
    assert whole_of(cls, NO_EXTRAS)["choices"][0]["stop_reason"] == "x"
    *before, last = chunks_of(cls, NO_EXTRAS)
    assert last["choices"][0]["stop_reason"] == "x"
    assert not any("stop_reason" in c["choices"][0] or "token_ids" in c["choices"][0] for c in before)


@pytest.mark.parametrize("cls", [CompletionFormat, ChatFormat])
def test_usage_in_every_chunk(cls: Any) -> None:
    usages = [c["usage"] for c in chunks_of(cls, Extras(PROMPTS, usage=True), include_usage=True)]
    counts = [(u["prompt_tokens"], u["completion_tokens"]) for u in usages]
    assert counts == ([(3, 0)] if cls is ChatFormat else []) + [(3, 1), (3, 2), (3, 3)]
    assert "usage" not in chunks_of(cls, Extras(PROMPTS, usage=True))[0]  # as in vLLM, include_usage is needed
