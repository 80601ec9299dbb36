"""Tables and pictures of places are of bounded size, and add up to the whole."""

from __future__ import annotations

import pytest

from serve_apps.console.live.places import KINDS, cells_of, heat_map, parts_of
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
def test_parts_and_cells_are_the_whole_pool(blocks: dict[str, int]) -> None:
    parts = parts_of(blocks)
    assert [part.kind for part in parts] == list(KINDS)
    assert {part.kind: part.num_blocks for part in parts if part.num_blocks} == blocks
    assert parts[-1].begin + parts[-1].share == pytest.approx(1)
    cells = cells_of(parts, 200)
    assert len(cells) == 200
    for part in parts:
        assert abs(cells.count(part.kind) - 200 * part.share) <= 1


def test_a_pool_without_blocks_has_no_cells() -> None:
    assert cells_of(parts_of({}), 200) == []
