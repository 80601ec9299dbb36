"""Demand is what somebody saw: bounded in time, in points and in rows."""

from __future__ import annotations

import json

import pytest

from serve_apps.console.demand import MOST_POINTS, Demand
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


def test_tokens_of_replicas_that_come_and_go() -> None:
    now, engines = 0.0, ScriptedGateway()
    demand = Demand(lambda: now)
    (one, two) = engines.status().replicas
    for counts, pace in (
        ([(one, 1000), (two, 9000)], None),
        ([(one, 1100), (two, 9100)], 100),
        ([(one, 1300)], 100),  # the second has gone
        ([(one, 1400), (two, 9300)], 700 / 6),  # it had only not answered
        ([(one, 1500), (two.model_copy(update={"pid": 9}), 100)], 112.5),  # it began anew
    ):
        engines.replicas = tuple(replica.model_copy(update={"num_output_tokens": num}) for replica, num in counts)
        demand.note(engines.status())
        assert demand.tokens_per_s() == (None if pace is None else pytest.approx(pace))
        now += 2
    assert [row.tokens_per_s for row in demand.rows(9)] == [100, 150, 100, 100, None]


def test_tokens_a_second_are_of_the_last_minute() -> None:
    now, engines = 0.0, ScriptedGateway()
    demand = Demand(lambda: now)
    demand.note(engines.status())
    for _ in range(100):
        now, engines.num_tokens = now + 2, engines.num_tokens + 60
        demand.note(engines.status())
    assert demand.tokens_per_s() == 30
    now, engines.num_tokens = now + 2, 10  # the replica began anew
    demand.note(engines.status())
    assert demand.tokens_per_s() == (29 * 60 + 10) / 60
