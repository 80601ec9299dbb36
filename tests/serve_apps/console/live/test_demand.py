"""Demand is what somebody saw: bounded in time, in points and in rows."""

from __future__ import annotations

import json

from serve_apps.console.live.demand import MOST_POINTS, Demand
from tests.serve_apps.console.site import ScriptedGateway


def test_half_an_hour_in_few_points() -> None:
    now, engines = 0.0, ScriptedGateway()
    demand = Demand(lambda: now)
    assert (demand.curve(), demand.rows(20), demand.tokens_per_s()) == ("", [], None)
    for _ in range(5000):
        demand.note(engines.status())
        now, engines.num_tokens = now + 0.5, engines.num_tokens + 50
    seconds, running, waiting = json.loads(demand.curve())
    assert len(seconds) == len(running) == len(waiting) <= MOST_POINTS
    assert (seconds[-1], running[-1], waiting[-1]) == (0, 6, 3)
    assert -1800 <= seconds[0] < -1780
    rows = demand.rows(20)
    assert (len(rows), rows[0].ago_s, rows[0].tokens_per_s, rows[-1].tokens_per_s) == (20, 0, 100, None)


def test_a_replica_that_has_gone_takes_its_count_along() -> None:
    now, engines = 0.0, ScriptedGateway()
    demand = Demand(lambda: now)
    for num_tokens, pace in ((1000, None), (1200, 100), (200, None), (300, 50), (500, 75)):
        engines.num_tokens = num_tokens
        demand.note(engines.status())
        assert demand.tokens_per_s() == pace
        now += 2
    assert [row.tokens_per_s for row in demand.rows(9)] == [100, 50, None, 100, None]
