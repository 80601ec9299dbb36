"""Frames: what goes in comes out, however the bytes are cut; and what is no frame is refused."""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loray.spec import TokenLogprobs
from serve_apps.channel.frames import (
    EMBEDDED,
    MAX_FRAME,
    PROMPT,
    SCORED,
    TOKENS,
    FrameError,
    FrameReader,
    frame,
    pack,
    parts,
    unpack_embedding,
    unpack_logprobs,
)
from tests.fixtures.channel import Out

LOGPROBS = st.builds(
    TokenLogprobs,
    st.floats(max_value=0, allow_nan=False),
    st.lists(st.tuples(st.integers(0, 200_000), st.floats(max_value=0, allow_nan=False)), max_size=20).map(tuple),
    st.integers(1, 200_000),
)
OUTPUTS = st.lists(
    st.tuples(
        st.integers(1, 1 << 40),
        st.builds(
            Out,
            st.none() | st.integers(0, 200_000),
            st.none() | st.sampled_from(["stop", "length"]),
            st.integers(0, 100_000),
            st.none() | LOGPROBS,
            st.none() | st.lists(LOGPROBS, min_size=1, max_size=3).map(tuple),
            st.none() | st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=5).map(tuple),
        ),
    ),
    max_size=6,
    unique_by=lambda item: item[0],
)


@given(OUTPUTS, st.lists(st.integers(1, 50), min_size=1))
def test_what_goes_in_comes_out(outputs: list[tuple[int, Out]], cuts: list[int]) -> None:
    data = pack([(stream, out) for stream, out in outputs if out.prompt_logprobs is None])
    data += b"".join(part for stream, out in outputs if out.prompt_logprobs is not None for part in parts(stream, out))
    reader, frames = FrameReader(), list[tuple[Any, ...]]()
    while data:
        size = cuts[len(frames) % len(cuts)]
        frames += reader.feed(data[:size])
        data = data[size:]
    got: dict[int, dict[str, Any]] = {}
    for kind, *fields in frames:
        if kind == PROMPT:
            stream, part = fields
            got.setdefault(stream, {})["prompt_logprobs"] = tuple(map(unpack_logprobs, part))
            continue
        if kind == EMBEDDED:
            stream, part = fields
            got.setdefault(stream, {})["embedding"] = unpack_embedding(part)
            continue
        assert kind in (TOKENS, SCORED)
        for stream, token, reason, num_cached, *scored in fields[0]:
            item = {"token_id": token, "finish_reason": reason, "num_cached_tokens": num_cached}
            item["logprobs"] = unpack_logprobs(*scored) if kind == SCORED else None
            got.setdefault(stream, {}).update(item)
    assert {stream: Out(**fields) for stream, fields in got.items()} == dict(outputs)


def test_long_prompts_and_many_streams_are_cut_into_frames() -> None:
    best = tuple((200_000 + i, -1.5) for i in range(20))
    prompt = tuple(TokenLogprobs(-0.5, best, i + 1) for i in range(5000))
    outputs = [(i, Out(7, logprobs=prompt[0])) for i in range(2, 5000)]
    data = b"".join(parts(1, Out(7, prompt_logprobs=prompt))) + pack(outputs)
    frames = list(FrameReader().feed(data))
    assert tuple(unpack_logprobs(lp) for kind, *fields in frames if kind == PROMPT for lp in fields[1]) == prompt
    assert sum(len(fields[0]) for kind, *fields in frames if kind == SCORED) == 4998


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<I", MAX_FRAME + 1),
        struct.pack("<I", 3) + b"\xc1\xc1\xc1",
        struct.pack("<I", 2) + msgpack.packb(1) + b"\x00",
        struct.pack("<I", 1) + msgpack.packb(1),
        struct.pack("<I", 1) + msgpack.packb([]),
        struct.pack("<I", 0),
    ],
)
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        list(FrameReader().feed(data))
    assert list(FrameReader().feed(frame(TOKENS, []) + data[:0])) == [(TOKENS, ())]
