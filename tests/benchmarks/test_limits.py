"""The benchmark of refusals: a request is late by what it takes beyond the median, and all bodies are refused."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from benchmarks.front.attack import Refusal, attack
from benchmarks.front.client import http_request, paced
from benchmarks.front.limits import Probe, limits, quiet
from benchmarks.front.started import serving
from loray.bases.registry import BaseModel


def test_a_delay_is_of_the_requests_beside_a_body() -> None:
    probes = [Probe(i / 10, 0.002) for i in range(100)]
    probes[20] = Probe(2.0, 0.022)  # beside the first body
    probes[54] = Probe(5.4, 0.052)  # before the second
    probes[55] = Probe(5.5, 0.032)  # under way when the second is sent
    refusals = [Refusal("a", 1.99, 2.005, 413, 7), Refusal("a", 5.51, 5.59, 400, 7)]
    assert len(quiet(refusals, probes)) == 96
    (row,) = limits("s", refusals, probes, typical_s=0.002)
    assert row.refused_ms == pytest.approx([15, 80])
    assert row.delay_ms == pytest.approx([20, 30])
    assert row.before_ms == pytest.approx([0, 50])
    assert (row.status, row.num_bytes, row.is_met) == (413, 7, True)
    accepted = [*refusals, Refusal("a", 7.0, 7.2, 200, 7)]
    (row,) = limits("s", accepted, probes, typical_s=0.002)
    assert (row.status, row.is_met) == (200, False)


def test_bodies_are_refused_while_others_are_answered(tiny_base: Callable[..., BaseModel]) -> None:
    base = tiny_base()
    names = ["60 MB, size not said", "100,000 brackets", "one that explodes later", "as many ids as are read"]
    with serving("gateway", base.name, base.path.parents[1], 0.0) as (port, _):
        setup = {"port": port, "model": base.name, "limit": 1 << 20, "names": names, "repeat": 2, "interval_s": 0.0}
        refusals = attack(setup | {"begin_at": time.perf_counter()})
        body = {"model": base.name, "prompt": [7], "max_tokens": 1, "stream": True}
        found = paced(port, http_request(body, "/v1/completions"), 100, 0.05, time.perf_counter())
    assert [r.status for r in refusals] == [413, 400, 400, 400] * 2
    assert len(found["began_s"]) == len(found["whole_s"]) == 5
