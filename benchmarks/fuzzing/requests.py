"""Requests drawn from OpenAPI documents: valid ones and invalid ones of every operation, equal for equal seeds."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Self
from urllib.parse import quote, urlsplit

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from benchmarks.fuzzing.callers import Callers

_OWN_HEADERS = ("X-Schemathesis-TestCaseId", "Connection", "Accept-Encoding", "Content-Length")
_KNOWN_SHARE = 0.5  # of the values that name something: what exists
_FEW_SHARE = 0.2  # of a body's other fields: all seldom fit together
_PLAIN: Mapping[str, Any] = {  # for drawn ones, which seldom are tokens of the base or a conversation
    "prompt": "I am hostile",
    "messages": [{"role": "user", "content": "I am hostile"}],
    "input": "I am hostile",
    "tokens": [40, 41, 42],
}


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. `caller`: whose key it has. `operation`: of the document. `target`: path and query."""

    caller: str
    operation: str
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"body": base64.b64encode(self.body).decode()})

    @classmethod
    def from_json(cls, line: str) -> Self:
        fields = json.loads(line)
        return cls(**fields | {"body": base64.b64decode(fields["body"])})


def draw(documents: Mapping[str, Any], callers: Callers, num: int, number: int) -> list[Asked]:
    """`num` requests in random order. `documents`: by the path before their operations; `number`: the seed.

    Each operation has as many as any other, half of them invalid by its schema.
    """
    chance = random.Random(number)
    strategies = [each for item in documents.items() for each in _strategies(*item)]
    chance.shuffle(strategies)  # where there are fewer requests than operations
    found = []
    for place, (operation, prefix, strategy) in enumerate(strategies):
        for case in _cases(strategy, (num - place - 1) // len(strategies) + 1, number):
            found.append(_asked(case, operation, prefix, callers, chance))
    chance.shuffle(found)
    return found


def _strategies(prefix: str, document: Any) -> Iterator[tuple[str, str, Any]]:
    """The operations in both modes."""
    schema = schemathesis.openapi.from_dict(document)
    schema.config.generation.update(with_security_parameters=False)
    for path, methods in document["paths"].items():
        for method in methods:
            operation = schema[path][method.upper()]
            for mode in GenerationMode:
                if mode is GenerationMode.NEGATIVE and not _takes_anything(operation):
                    continue
                yield f"{method.upper()} {prefix}{path}", prefix, operation.as_strategy(generation_mode=mode)


def _takes_anything(operation: Any) -> bool:
    return bool(operation.body) or any(True for _ in operation.iter_parameters())


def _cases(strategy: Any, num: int, number: int) -> list[Any]:
    """Fewer, where there are not as many; the first are Hypothesis' simplest."""
    found: list[Any] = []
    if num < 1:
        return found

    @seed(number)
    @settings(
        max_examples=num, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(case=strategy)
    def collect(case: Any) -> None:
        found.append(case)

    with suppress(Unsatisfiable):  # what takes any text has no invalid request
        collect()
    return found


def _asked(case: Any, operation: str, prefix: str, callers: Callers, chance: random.Random) -> Asked:
    caller = chance.choice(list(callers.headers))
    _name_what_exists(case, caller, callers, chance)
    fields = case.as_transport_kwargs(base_url=f"http://127.0.0.1{prefix}")
    fields["headers"] = {k: _text(v) for k, v in fields["headers"].items() if k not in _OWN_HEADERS}
    made = requests.Request(**fields).prepare()
    headers = {k: v for k, v in made.headers.items() if k not in _OWN_HEADERS}
    parts = urlsplit(str(made.url))
    body = made.body or b""
    return Asked(
        caller,
        operation,
        str(made.method),
        f"{parts.path}?{parts.query}" if parts.query else parts.path,
        headers | dict(callers.headers[caller]),
        body.encode() if isinstance(body, str) else bytes(body),
    )


def _name_what_exists(case: Any, caller: str, callers: Callers, chance: random.Random) -> None:
    """So that a part of the requests get further than to a name."""
    known = callers.known[caller]
    if isinstance(case.path_parameters, dict):
        for name, values in known.items():
            if name in case.path_parameters and chance.random() < _KNOWN_SHARE:
                case.path_parameters[name] = quote(chance.choice(values), safe="")  # as the drawn ones are
    for parameter in case.operation.query:
        if parameter.name in known and chance.random() < _KNOWN_SHARE:
            case.query = case.query if isinstance(case.query, dict) else {}
            case.query[parameter.name] = chance.choice(known[parameter.name])
    if isinstance(case.body, dict) and "model" in case.body and chance.random() < _KNOWN_SHARE:
        few = {name: value for name, value in case.body.items() if chance.random() < _FEW_SHARE}
        asked = {name: plain for name, plain in _PLAIN.items() if name in case.body}
        case.body = few | asked | {"model": chance.choice(callers.models)}


def _text(value: Any) -> str:
    """Of a header: without the ends of lines that would make it two."""
    return str(value).replace("\r", " ").replace("\n", " ").encode("latin-1", "replace").decode("latin-1").strip()
