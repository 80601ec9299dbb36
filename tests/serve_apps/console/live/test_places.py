"""Tables and pictures of places are of bounded size, and add up to the whole."""

from __future__ import annotations

import pytest

from loray.spec import Stretch
from serve_apps.console.live.places import KINDS, heat_map, parts_of, rows_of, strip_of
from tests.serve_apps.console.site import ScriptedGateway


def test_what_more_replicas_hold_comes_first() -> None:
    rows, num_held = heat_map(ScriptedGateway().status().replicas, 4)
    assert num_held == 5
    assert [row.adapter for row in rows] == ["dates@1", "tone@2", "cold@1", "legal@1"]
    assert rows[0].tiers == ("host", "host")
    assert rows[2].tiers == ("", "loading")


def test_rows_are_bounded() -> None:
    (replica, _) = ScriptedGateway().status().replicas
    replicas = [
        replica.model_copy(update={"replica": f"r{n}", "adapters_in_pool": tuple(f"a-{n + m}@1" for m in range(1000))})
        for n in range(40)
    ]
    rows, num_held = heat_map(replicas, 50)
    assert (len(rows), num_held, len(rows[0].tiers)) == (50, 1040, 40)


@pytest.mark.parametrize("blocks", [{"free": 60, "kv": 30, "flat": 10}, {"free": 7}, {"run": 1, "kv": 10_000}])
def test_parts_are_the_whole_pool(blocks: dict[str, int]) -> None:
    parts = parts_of(blocks)
    assert [part.kind for part in parts] == list(KINDS)
    assert {part.kind: part.num_blocks for part in parts if part.num_blocks} == blocks
    assert parts[-1].begin + parts[-1].share == pytest.approx(1)


def test_stretches_are_where_their_blocks_are() -> None:
    layout = (Stretch("kv", 20), Stretch("free", 55), Stretch("kv", 1), Stretch("run", 4))
    assert strip_of(layout) == [
        ("kv", "M0.0 0h250.0v10h-250.0zM937.5 0h12.5v10h-12.5z"),
        ("free", "M250.0 0h687.5v10h-687.5z"),
        ("run", "M950.0 0h50.0v10h-50.0z"),
    ]
    assert rows_of(layout) == [(0, 19, "kv"), (20, 74, "free"), (75, 75, "kv"), (76, 79, "run")]
    assert (strip_of(()), rows_of(())) == ([], [])
