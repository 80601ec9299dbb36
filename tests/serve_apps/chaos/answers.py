"""What a response says, in one form for events and whole bodies; and whether it is what it may be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.serve_apps.chaos.kinds import Kind

_TOLERANCE = 5e-3  # of a log-probability, which depends on who else is in a step


@dataclass(slots=True)
class Choice:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(slots=True)
class Answer:
    """`usage`: prompt and completion tokens. `error`: the object of a failure, in the body or in the last event."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: tuple[int, int] | None = None
    error: dict[str, Any] | None = None
    is_done: bool = False  # a whole body, or the event that ends a stream

    def add(self, part: dict[str, Any], kind: Kind) -> None:
        if "error" in part:
            self.error = part["error"]
            return
        if part.get("usage"):
            self.usage = part["usage"]["prompt_tokens"], part["usage"]["completion_tokens"]
        for given in part["choices"]:
            choice = self.choices.setdefault(given["index"], Choice())
            assert choice.finish_reason is None or not _text(given, kind), "text after the end"
            choice.text += _text(given, kind)
            choice.token_ids += given.get("token_ids") or ()
            choice.finish_reason = given.get("finish_reason") or choice.finish_reason
            scores = given.get("logprobs") or {}
            choice.logprobs += [s["logprob"] for s in scores.get("content") or ()] if kind.is_chat else _scores(scores)


def read(body: bytes, content_type: str, kind: Kind) -> Answer:
    """AssertionError if the body is in neither form, or goes on after its end. A stream that was cut is read as far as
    it goes."""
    answer = Answer()
    if not content_type.startswith("text/event-stream"):
        answer.add(json.loads(body), kind)
        answer.is_done = answer.error is None
        return answer
    for event in _events(body):
        assert not answer.is_done, "an event after the last one"
        assert answer.error is None, "an event after an error"
        if event == "[DONE]":
            answer.is_done = True
        else:
            answer.add(json.loads(event), kind)
    return answer


def _events(body: bytes) -> Iterator[str]:
    *whole, _ = body.decode(errors="replace").split("\n\n")
    for event in whole:
        if not event.startswith(":"):  # a heart-beat
            assert event.startswith("data: "), event
            yield event.removeprefix("data: ")


def _text(given: dict[str, Any], kind: Kind) -> str:
    if not kind.is_chat:
        return str(given["text"])
    return (given.get("message") or given.get("delta") or {}).get("content") or ""


def _scores(scores: dict[str, Any]) -> list[float]:
    return list(scores.get("token_logprobs") or ())


def difference(answer: Answer, reference: Answer, *, is_part: bool) -> str | None:
    """Where the answer differs from the undisturbed one; None: nowhere. `is_part`: it may end early."""
    for index, whole in reference.choices.items():
        choice = answer.choices.get(index, Choice())
        pairs = ((choice.text, whole.text), (choice.token_ids, whole.token_ids))
        for got, right in pairs:
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
