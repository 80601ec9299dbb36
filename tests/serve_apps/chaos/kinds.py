"""The requests of a random run. Each has one right answer, whoever else asks at the same time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "wizards", "box", "quietly")
_SYSTEM = "You answer in one line, and never say more than you have been asked. "
_SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["sedan", "truck"]}, "doors": {"enum": [2, 4]}},
    "required": ["kind", "doors"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """`body` is that of a request for a whole answer. `is_fat`: its answer is larger than sockets' buffers."""

    path: str
    body: dict[str, Any]
    is_fat: bool = False

    @property
    def is_chat(self) -> bool:
        return self.path == "/v1/chat/completions"


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
    body |= rng.choice([{}, {}, {}, _structure(rng)])
    if rng.random() < 0.5:
        body |= rng.choice([{}, {}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 3}])
        return Kind("/v1/chat/completions", body | {"messages": [{"role": "user", "content": _prompt(rng)}]})
    body |= rng.choice([{}, {}, {"logprobs": 0}, {"logprobs": 3}])
    return Kind("/v1/completions", body | {"prompt": [_prompt(rng) for _ in range(rng.choice([1, 1, 1, 2]))]})


def _fat(model: str, rng: random.Random) -> Kind:
    body = {"model": model, "prompt": _prompt(rng)[:60], "max_tokens": 240, "ignore_eos": True, "logprobs": 20, "n": 3}
    return Kind("/v1/completions", body | _sampling(rng), is_fat=True)


def _sampling(rng: random.Random) -> dict[str, Any]:
    return rng.choice([{"temperature": 0}, {"temperature": 1, "seed": rng.randrange(1000)}])


def _structure(rng: random.Random) -> dict[str, Any]:
    schema = {"type": "json_schema", "json_schema": {"name": "car", "schema": _SCHEMA}}
    return rng.choice(
        [
            {"response_format": schema},
            {"guided_regex": "[a-z ]{5,40}"},
            {"guided_choice": ["left", "right", "straight"]},
        ]
    )


def _prompt(rng: random.Random) -> str:
    """Of 1 to 380 bytes, often with a beginning that others share."""
    words = " ".join(rng.choice(_WORDS) for _ in range(rng.choice([1, 3, 10, 60])))
    return (rng.choice(["", _SYSTEM]) + words)[: rng.choice([20, 120, 380])]
