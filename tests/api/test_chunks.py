"""Chunks from templates are, byte for byte, those that the response models write."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loray.schemas.openai.formats import ChatFormat, Chunks, CompletionFormat
from loray.spec import Delta, TokenLogprob

LOGPROBS = (TokenLogprob(5, "é", -0.5, ((5, "é", -0.5), (6, "\n", -1.25)), 1),)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    ['"', "\\", "\x00\x1f\x7f\u2028"]
)
deltas = st.tuples(
    st.integers(0, 3),
    st.builds(
        lambda text, finish, logprobs: Delta(text, (1,), logprobs, finish, 3, 4),
        texts,
        st.sampled_from([None, None, "stop", "length"]),
        st.sampled_from([None, None, (), LOGPROBS]),
    ),
)


@pytest.mark.parametrize("format_of", [CompletionFormat, ChatFormat])
@settings(max_examples=150, deadline=None)
@given(
    usage=st.booleans(),
    model=st.sampled_from(["base", "tone@3", "@text", 'a"@id"b', "@fingerprint", "ü"]),
    many=st.lists(deltas),
)
def test_templates_write_what_the_models_write(format_of: Any, usage: bool, model: str, many: list[Any]) -> None:
    fields = ("cmpl-0123", 1_700_000_000, model, "loray-0.1-abc", usage)
    chunks, oracle = Chunks(format_of(*fields), "data: ", "\n\n"), format_of(*fields)
    opened = set()
    for index, delta in many:
        expected = []
        if index not in opened and (opening := oracle.opening(index)) is not None:
            expected.append(opening)
        opened.add(index)
        if delta.text or delta.finish_reason or delta.logprobs:
            expected.append(oracle.chunk(index, delta))
        assert chunks.push(index, delta) == "".join(f"data: {chunk.to_json()}\n\n" for chunk in expected)
