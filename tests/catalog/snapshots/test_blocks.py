"""The sorted map, against a dictionary."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loray.catalog import snapshot
from loray.catalog.snapshot import SortedMap

KEYS = st.integers(0, 60)
CHANGES = st.lists(st.dictionaries(KEYS, st.none() | st.integers(1, 9), max_size=12), max_size=12)


@given(start=st.dictionaries(KEYS, st.integers(1, 9)), changes=CHANGES, asked=KEYS, size=st.integers(2, 8))
def test_it_is_a_sorted_dictionary(
    start: dict[int, int], changes: list[dict[int, int | None]], asked: int, size: int
) -> None:
    full, snapshot._FULL = snapshot._FULL, size
    try:
        found, expected = SortedMap(start.items()), dict(start)
        for change in changes:
            before, kept = found, dict(expected)
            found = found.changed(change)
            expected = {k: v for k, v in (expected | change).items() if v is not None}
            assert before == kept
    finally:
        snapshot._FULL = full
    assert (list(found), len(found), found) == (sorted(expected), len(expected), expected)
    assert found.find(asked) == expected.get(asked)
    assert (asked in found) == (asked in expected)
    assert list(found.after(asked)) == [v for k, v in sorted(expected.items()) if k > asked]
    assert list(found.after(None)) == [v for _, v in sorted(expected.items())]
    around, num_before = found.around(asked, 6), sum(k < asked for k in expected)
    first = min(max(0, num_before - 3), max(0, len(expected) - 6))
    assert list(around) == sorted(expected)[first : first + 6]


def test_a_change_shares_all_other_blocks() -> None:
    before = SortedMap((i, str(i)) for i in range(10_000))
    after = before.changed({5_000: "new", 20_000: "last"})
    shared = set(map(id, before._blocks)) & set(map(id, after._blocks))
    assert len(after._blocks) - len(shared) == 2
    assert before.changed({}) is before
