"""The priority queue gives what sorting all items would give."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from loray.engine.memory.eviction import PriorityQueue


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.none() | st.integers(0, 5)), max_size=300))
def test_the_least_is_first_whatever_was_set_and_removed(changes: list[tuple[str, int | None]]) -> None:
    queue: PriorityQueue[str] = PriorityQueue()
    known: dict[str, int] = {}  # the one that was set last stands last
    for item, key in changes:
        known.pop(item, None)
        if key is None:
            queue.discard(item)
        else:
            queue.set(item, key)
            known[item] = key
        assert queue.items() == known.keys()
        assert len(queue) == len(known)
        first = min(known, key=known.__getitem__, default=None)
        assert queue.peek() == (None if first is None else (known[first], first))


def test_stale_entries_do_not_pile_up() -> None:
    queue: PriorityQueue[str] = PriorityQueue()
    for i in range(10_000):
        queue.set("a", i)
    assert len(queue._heap) < 100
