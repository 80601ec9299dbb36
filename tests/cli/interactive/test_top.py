"""`loray top`, and the figures that it shows."""

from __future__ import annotations

import json
import math

import pytest

from loray.cli.top import since
from loray.client.metrics import percentile
from tests.cli.interactive.conftest import Server
from tests.cli.run import Loray


def test_percentiles_of_buckets() -> None:
    buckets = {0.1: 50.0, 1.0: 100.0, math.inf: 100.0}
    assert percentile(buckets, 0.5) == pytest.approx(0.1)
    assert percentile(buckets, 0.75) == pytest.approx(0.55)
    assert percentile({0.1: 0.0, math.inf: 4.0}, 0.5) == 0.1  # above every bound
    assert percentile({}, 0.5) is None
    assert percentile({1.0: 0.0, math.inf: 0.0}, 0.5) is None


def test_percentiles_since_an_earlier_moment() -> None:
    now, earlier = {1.0: 5.0, math.inf: 8.0}, {1.0: 4.0, math.inf: 4.0}
    assert since(now, earlier) == {1.0: 1.0, math.inf: 4.0}
    assert since(now, None) == since(now, now) == now  # nothing in between
    assert since(earlier, now) == earlier  # the replica began anew


def test_json(loray: Loray, server: Server) -> None:
    found = json.loads(loray("top", "--json", "--interval", 0.01).out)
    assert (found["status"], found["base"], found["adapters"]) == ("ok", "tiny", 2)
    first = found["replicas"][0]
    assert (first["replica"], first["running"], first["waiting"], first["pool_used"]) == ("r1", 2, 3, 0.75)
    assert (first["adapters_in_pool"], first["adapters_on_host"]) == (1, 2)
    assert 0 < first["tokens_per_s"] <= 100 / 0.01
    assert first["ttft_p50_s"] == pytest.approx(0.1)
    assert first["ttft_p99_s"] == pytest.approx(0.982)
    (gateway,) = found["gateways"]
    assert (gateway["gateway"], gateway["under_way"], gateway["requests"]) == ("g1", 4, 20)
    assert found["placements"] == [
        {"adapter": "tone@1", "pools": 2, "hosts": 0},
        {"adapter": "dates@2", "pools": 1, "hosts": 1},
    ]


def test_once_is_one_table(loray: Loray, server: Server) -> None:
    shown = loray("top", "--once", "--interval", 0.01)
    assert shown.code == 0
    assert server.looks == 2
    for word in ("REPLICA", "r1", "r2", "75%", "100 ms", "GATEWAY", "g1", "tone@1"):
        assert word in shown.out


def test_a_key_that_may_not_read_metrics(loray: Loray, server: Server) -> None:
    server.refuses_metrics = True
    found = json.loads(loray("top", "--json", "--interval", 0.01).out)
    assert found["gateways"] == []
    assert found["replicas"][0]["ttft_p50_s"] is None
    assert found["replicas"][0]["tokens_per_s"] > 0
