"""The scanner of one JSON object against Python's decoder, by prefix: valid ones end where they end, others are BAD."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from loray.text.tools.json_calls import JsonScanner, JsonToken

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=3), c, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=3), values, max_size=4)


def scan(text: str) -> list[JsonToken]:
    """The part of each character, up to END or BAD."""
    scanner, parts = JsonScanner(), list[JsonToken]()
    for c in text:
        parts.append(scanner.feed(c))
        if parts[-1] in (JsonToken.END, JsonToken.BAD):
            break
    return parts


@given(objects.map(json.dumps), st.integers(0, 60), st.characters() | st.sampled_from('{}[]",:0.e-\\tu'))
def test_what_is_no_json_is_bad_and_what_is_ends(text: str, at: int, inserted: str) -> None:
    changed = text[: at % len(text)] + inserted + text[at % len(text) :]
    parts = scan(changed)
    try:
        value, end = json.JSONDecoder().raw_decode(changed)
    except json.JSONDecodeError:
        assert parts[-1] is not JsonToken.END
        return
    if isinstance(value, dict):
        assert len(parts) == end
        assert parts[-1] is JsonToken.END


def test_numbers_and_escapes() -> None:
    for good in ("0", "-1", "1.50", "2e+7", "true", "null", '"\\u00Ff\\/"'):
        assert scan(f'{{"a": {good} }}')[-1] is JsonToken.END, good
    for bad in ("01", "1.", ".5", "+1", "1e", "--1", "tru", "nul}", '"\\x"', '"\\u00g0"', '"\n"', "'a'", "NaN"):
        assert scan(f'{{"a": {bad} }}')[-1] is JsonToken.BAD, bad
