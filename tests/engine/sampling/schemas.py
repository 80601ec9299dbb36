"""Random JSON schemas, the same for each seed."""

from __future__ import annotations

import random
from typing import Any

_WORDS = ("name", "age", "city", "ok", "größe", "a b", 'q"t', "x/y", "tags")


def random_schema(seed: int) -> dict[str, Any]:
    """An object with properties of every kind, three levels deep."""
    return _object(random.Random(seed), depth=3)


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    leaves = [_string, _integer, _number, _boolean, _enum, _const, _pattern, _format]
    inner = [_object, _array, _any_of, _tuple]
    return rng.choice(leaves + inner if depth > 0 else leaves)(rng, depth - 1)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_WORDS, rng.randint(1, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: _any(rng, depth) for name in names}}
    schema["required"] = [name for name in names if rng.random() < 0.6]
    schema["additionalProperties"] = rng.choice([False, False, False, {"type": "boolean"}])
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth), "minItems": low, "maxItems": low + rng.randint(0, 2)}


def _tuple(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "array", "prefixItems": [_any(rng, depth), _any(rng, depth)], "items": False, "minItems": 2}


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth) for _ in range(rng.randint(2, 3))]}


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(0, 2)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 12)}


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-300, 300)
    return rng.choice([{"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}, {"type": "integer"}])


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice([{"type": "number", "minimum": 0, "exclusiveMaximum": 10}, {"type": ["number", "null"]}])


def _boolean(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null"])}


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": rng.sample(["red", "green", "blue", 1, 2.5, None, True, ["x"], {"k": "v"}, "naïve \U0001f600"], 4)}


def _const(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"const": rng.choice(["fixed", 7, None, False])}


def _pattern(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "string", "pattern": rng.choice(["^[A-Z]{2}-[0-9]{3}$", "^(a|bc)+$", "^\\w{1,8}@\\w{1,8}\\.com$"])}


def _format(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "string", "format": rng.choice(["date", "time", "ipv4", "uuid", "date-time"])}
