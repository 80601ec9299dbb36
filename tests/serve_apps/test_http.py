"""Bodies of requests: refused for their size before they are read, and for their shape before they are parsed."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

import httpx
import pytest
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st

from serve_apps import http
from serve_apps.http import (
    INLINE_BYTES,
    MAX_ARRAYS_AND_OBJECTS,
    MAX_DEPTH,
    MAX_MEMBERS,
    MAX_VALUES,
    BodyLimit,
    check_shape,
    parse_json,
    read,
)

LIMIT = 4096


def post(content: bytes | AsyncIterator[bytes], **headers: str) -> httpx.Response:
    app = FastAPI()
    app.add_middleware(BodyLimit, max_bytes=lambda _: LIMIT, advice="send less")

    @app.post("/")
    async def echo(request: Request) -> int:
        return len(await request.body())

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post("/", content=content, headers=headers)

    return asyncio.run(ask())


class Chunks:
    """A body without Content-Length, which counts how many chunks of 1 KiB were taken."""

    def __init__(self, num: int) -> None:
        self.num, self.taken = num, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(self.num):
            self.taken += 1
            yield b"x" * 1024


def test_a_body_is_refused_by_its_length_or_by_its_first_bytes_too_many() -> None:
    assert post(b"x" * LIMIT).json() == LIMIT
    response = post(b"x" * (LIMIT + 1))
    assert response.status_code == 413
    assert response.json()["detail"] == "the request's body is larger than 4 KiB; send less"
    chunks = Chunks(100)
    assert post(chunks).status_code == 413  # type: ignore[arg-type]
    assert chunks.taken == 5
    assert post(Chunks(4)).json() == LIMIT  # type: ignore[arg-type]


@pytest.mark.parametrize("length", ["60000000", "9" * 40, "-1", "x"])
def test_a_length_that_is_too_large_or_no_number_is_refused_without_reading(length: str) -> None:
    chunks = Chunks(3)
    assert post(chunks, **{"Content-Length": length}).status_code == 413  # type: ignore[arg-type]
    assert chunks.taken == 0


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (nested(MAX_DEPTH + 1), "nested deeper than 64"),
        ('{"a":' * 100_000, "nested deeper than 64"),
        ("[" + "[]," * MAX_ARRAYS_AND_OBJECTS + "1]", "more than 32,768 arrays and objects"),
        ("[" + "1," * MAX_VALUES + "1]", "more than 327,680 values"),
        (json.dumps(dict.fromkeys(map(str, range(MAX_MEMBERS + 1)))), "2,049 members"),
        ("[NaN]", "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity"),
        ('"\\ud800"', "surrogates not allowed"),
        ('"\\uD800x"', "surrogates not allowed"),
        ("1" * 5000, "digits"),
    ],
)
def test_what_is_refused(text: str, match: str) -> None:
    for raw in (text, text.encode()):
        with pytest.raises(ValueError, match=match):
            parse_json(raw)


def test_what_is_taken() -> None:
    assert parse_json(nested(MAX_DEPTH)) == json.loads(nested(MAX_DEPTH))
    assert parse_json(json.dumps("[{" * 200_000)) == "[{" * 200_000  # brackets in a text are text
    assert parse_json('{"a": 1, "a": "\\ud83d\\ude00"}') == {"a": "\N{GRINNING FACE}"}
    assert parse_json('{"a": "é"}'.encode("utf-16")) == {"a": "é"}


@pytest.mark.parametrize("text", ['"' + '\\"' * 200_000, "\\" * 400_000, '"a' + "\\\\" * 200_000])
def test_malformed_texts_take_linear_time(text: str) -> None:
    """With a pattern that is quadratic this test does not end."""
    check_shape("[]" * (MAX_DEPTH + 1) + text)


def depth(value: Any) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if parts is None else 1 + max(map(depth, parts), default=0)


@given(st.recursive(st.integers() | st.text('[{"\\,'), lambda v: st.lists(v) | st.dictionaries(st.text('[{"\\'), v)))
def test_the_depth_of_a_text_is_that_of_its_value(value: Any) -> None:
    with mock.patch.object(http, "MAX_DEPTH", 2):
        if depth(value) <= 2:
            check_shape(json.dumps(value))
        else:
            with pytest.raises(ValueError, match="nested"):
                check_shape(json.dumps(value))


@pytest.mark.parametrize(("size", "thread"), [(INLINE_BYTES, "MainThread"), (INLINE_BYTES + 1, "bodies_0")])
def test_long_bodies_are_parsed_in_a_thread(size: int, thread: str) -> None:
    async def receive() -> Any:
        return {"type": "http.request", "body": b"x" * size}

    async def run() -> str:
        request = Request({"type": "http", "method": "POST", "headers": []}, receive)
        return await read(request, lambda raw: threading.current_thread().name)

    assert asyncio.run(run()) == thread
