"""Fields of request bodies that have several forms, converted into one. Any other form is a RequestError."""

from __future__ import annotations

from typing import Any

from loray.errors import RequestError

Prompt = str | tuple[int, ...]


def strings(value: object) -> object:
    """`stop`: a string or a list of them."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
        raise RequestError("must be a non-empty string or a list of such strings")
    return tuple(values)


def token_ids(value: object) -> object:
    if not isinstance(value, list) or not _is_token_ids(value):
        raise RequestError("must be a list of token ids")
    return tuple(value)


def bias(value: object) -> object:
    """`logit_bias`: an object from token ids to numbers. Keys of JSON objects are strings."""
    try:
        return {int(token): added for token, added in value.items()}  # type: ignore[attr-defined]
    except (AttributeError, ValueError) as e:
        raise RequestError("must be an object from token ids to numbers") from e


def prompts(value: object) -> tuple[Prompt, ...]:
    """`prompt`: a string, a list of strings, one list of token ids, or a list of lists of token ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(v, str) for v in value):
            return tuple(value)
        if _is_token_ids(value):
            return (tuple(value),)
        if all(isinstance(v, list) and v and _is_token_ids(v) for v in value):
            return tuple(tuple(v) for v in value)
    raise RequestError("must be a string, a list of strings, a list of token ids or a list of lists of token ids")


def _is_token_ids(values: list[Any]) -> bool:
    return all(type(v) is int and v >= 0 for v in values)


def text(value: object) -> str:
    """`content`: a string, or a list of text parts, which are joined by newlines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise RequestError("must be a string or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise RequestError(f"content parts of type {kind!r} are not supported; only text is")
        if not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
            raise RequestError('a text part is {"type": "text", "text": "..."} and nothing else')
        texts.append(part["text"])
    return "\n".join(texts)
