"""Random requests, each of which has one right answer, whoever else asks at the same time; and whether it came."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.faults.client import Client, Reply

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "wizards", "box", "quietly")
_SYSTEM = "You answer in one line, and never say more than you have been asked. "
_SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["sedan", "truck"]}, "doors": {"enum": [2, 4]}},
    "required": ["kind", "doors"],
    "additionalProperties": False,
}
_STRUCTURES: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "car", "schema": _SCHEMA}}},
    {"guided_regex": "[a-z ]{5,40}"},
    {"guided_choice": ["left", "right", "straight"]},
]
_TOLERANCE = 5e-3  # of a log-probability, which depends on who else is in a step


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """`body` is that of a request for a whole answer. `is_fat`: its answer is larger than sockets' buffers."""

    path: str
    body: dict[str, Any]
    is_fat: bool = False


def make_kinds(models: Sequence[str], num: int, rng: random.Random) -> list[Kind]:
    """One in ten is fat."""
    return [_fat(rng.choice(models), rng) if i % 10 == 9 else _kind(models[i % len(models)], rng) for i in range(num)]


def _kind(model: str, rng: random.Random) -> Kind:
    body: dict[str, Any] = {"model": model, "max_tokens": rng.choice([1, 3, 12, 12, 30, 80]), **_sampling(rng)}
    body |= rng.choice([{}, {}, {"n": 2}, {"n": 3}])
    body |= rng.choice([{}, {"return_token_ids": True}])
    body |= rng.choice([{}, {"ignore_eos": True}])
    body |= rng.choice([{}, {}, {"stop": ["e", "on", "\n"]}, {"stop": [" "], "include_stop_str_in_output": True}])
    body |= rng.choice([{}, {}, {}, {"frequency_penalty": 0.5}])
    body |= rng.choice([{}, {}, {}, rng.choice(_STRUCTURES)])
    if rng.random() < 0.5:
        body |= rng.choice([{}, {}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 3}])
        return Kind(CHAT, body | {"messages": [{"role": "user", "content": _prompt(rng)}]})
    body |= rng.choice([{}, {}, {"logprobs": 0}, {"logprobs": 3}])
    return Kind(COMPLETIONS, body | {"prompt": [_prompt(rng) for _ in range(rng.choice([1, 1, 1, 2]))]})


def _fat(model: str, rng: random.Random) -> Kind:
    body = {"model": model, "prompt": _prompt(rng)[:60], "max_tokens": 240, "ignore_eos": True, "logprobs": 20, "n": 3}
    return Kind(COMPLETIONS, body | _sampling(rng), is_fat=True)


def _sampling(rng: random.Random) -> dict[str, Any]:
    return rng.choice([{"temperature": 0}, {"temperature": 1, "seed": rng.randrange(1000)}])


def _prompt(rng: random.Random) -> str:
    """Of 1 to 380 bytes, often with a beginning that others share."""
    words = " ".join(rng.choice(_WORDS) for _ in range(rng.choice([1, 3, 10, 60])))
    return (rng.choice(["", _SYSTEM]) + words)[: rng.choice([20, 120, 380])]


@dataclass(slots=True)
class Choice:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(slots=True)
class Answer:
    """What a response says, in one form for events and whole bodies.

    usage    prompt and completion tokens
    error    the object of a failure, in the body or in the last event
    is_done  a whole body, or the event that ends a stream
    """

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: tuple[int, int] | None = None
    error: dict[str, Any] | None = None
    is_done: bool = False

    def _add(self, part: dict[str, Any]) -> None:
        if "error" in part:
            self.error = part["error"]
            return
        if part.get("usage"):
            self.usage = part["usage"]["prompt_tokens"], part["usage"]["completion_tokens"]
        for given in part["choices"]:
            choice = self.choices.setdefault(given["index"], Choice())
            message = given.get("message") or given.get("delta") or {}
            text = str(given["text"]) if "text" in given else message.get("content") or ""
            assert choice.finish_reason is None or not text, "text after the end"
            choice.text += text
            choice.token_ids += given.get("token_ids") or ()
            choice.finish_reason = given.get("finish_reason") or choice.finish_reason
            scores = given.get("logprobs") or {}
            choice.logprobs += [score["logprob"] for score in scores.get("content") or ()]
            choice.logprobs += scores.get("token_logprobs") or ()


def read(reply: Reply) -> Answer:
    """AssertionError if the body is in neither form, or goes on after its end. A stream that was cut is read as far as
    it goes.
    """
    answer = Answer()
    if not reply.is_stream:
        answer._add(json.loads(reply.body))
        answer.is_done = answer.error is None
        return answer
    for event in _events(reply.body):
        assert not answer.is_done, "an event after the last one"
        assert answer.error is None, "an event after an error"
        if event == "[DONE]":
            answer.is_done = True
        else:
            answer._add(json.loads(event))
    return answer


def _events(body: bytes) -> Iterator[str]:
    *whole, _ = body.decode(errors="replace").split("\n\n")
    for event in whole:
        if not event.startswith(":"):  # a heart-beat
            assert event.startswith("data: "), event
            yield event.removeprefix("data: ")


def difference(answer: Answer, reference: Answer, *, is_part: bool) -> str | None:
    """Where the answer differs from the undisturbed one; None: nowhere. `is_part`: it may end early."""
    for index, whole in reference.choices.items():
        choice = answer.choices.get(index, Choice())
        for got, right in ((choice.text, whole.text), (choice.token_ids, whole.token_ids)):
            if got != (right[: len(got)] if is_part else right):
                return f"choice {index}: {got!r} instead of {right!r}"
        if len(choice.logprobs) > len(whole.logprobs) or (not is_part and len(choice.logprobs) < len(whole.logprobs)):
            return f"choice {index}: {len(choice.logprobs)} log-probabilities instead of {len(whole.logprobs)}"
        if any(abs(a - b) > _TOLERANCE for a, b in zip(choice.logprobs, whole.logprobs, strict=False)):
            return f"choice {index}: other log-probabilities"
        if choice.finish_reason != whole.finish_reason and not (is_part and choice.finish_reason is None):
            return f"choice {index}: ended by {choice.finish_reason} instead of {whole.finish_reason}"
    if answer.choices.keys() - reference.choices.keys():
        return "more choices than asked for"
    if answer.usage not in (reference.usage, None):
        return f"{answer.usage} prompt and completion tokens instead of {reference.usage}"
    return None


async def undisturbed(url: str, kinds: Sequence[Kind], headers: dict[str, str]) -> dict[Kind, Answer]:
    """The answers to one request after the other: later ones must be the same."""
    client, found = Client(url), {}
    for kind in kinds:
        reply = await client.ask(kind.path, headers, json.dumps(kind.body).encode())
        assert (reply.status, reply.end) == (200, "whole"), (kind, reply)
        found[kind] = read(reply)
    client.close()
    return found
