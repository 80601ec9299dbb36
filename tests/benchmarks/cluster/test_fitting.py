"""What work costs, from what clients saw: the profile for the simulator."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cluster.__main__ import Run, _simulated
from benchmarks.cluster.client import Seen
from benchmarks.cluster.crowd import Crowd
from benchmarks.cluster.fitting import decoding, end_known_s, fit, profile, undisturbed
from benchmarks.cluster.rows import row
from benchmarks.cluster.trace import Asked, Load, make_trace
from benchmarks.cluster.world import Figures
from loray.simulation.cluster import SimulatedRequest
from loray.simulation.profile import SMOLLM2_TWO_CORES, Profile
from loray.simulation.routers import RandomRouter
from loray.simulation.scalers import Fixed
from loray.simulation.simulator import Policy, Simulator
from loray.spec import ServeSpec
from tests.benchmarks.test_cluster import figures, seen
from tests.fixtures.simulation import requests

STEP, ROW, PROMPT, OUTSIDE = 0.004, 0.001, 2e-5, 0.01
SPEC = ServeSpec(base="tiny", pool_bytes=1 << 20, host_bytes=200_000)
MOST = 512
PROCESSORS = 8


def probe(at: float, **fields: Any) -> Seen:
    return seen(at, probe=True, **fields)


def _made(num: int) -> list[Seen]:
    """Requests that cost what the constants say. Every second one comes beside another."""
    chance, found = random.Random(0), []
    for i in range(num):
        at, prompt, beside = float(i), chance.randrange(5, 500), i % 2
        first = at + OUTSIDE + STEP + ROW + PROMPT * prompt
        for copy in range(1 + beside):
            last = first + 9 * (STEP + ROW * (1 + beside))
            found.append(
                probe(at + 1e-6 * copy, first=first, last=last, num_prompt=prompt, num_output=10, adapter=i % 5)
            )
    return found


def _figures(**fields: Any) -> list[Figures]:
    defaults = {"blocks": {"free": 64, "layered": 64}, "adapters_in_pool": ("x",), "num_loads": 1}
    return [figures(**(defaults | {"num_loaded_bytes": 20_000} | fields))]


def _simulated_answers(costs: Profile, asked: Sequence[Asked]) -> list[Seen]:
    """What a client would see of three replicas with these costs."""
    routed = {}

    class Noting(RandomRouter):
        def choose(self, job: SimulatedRequest, now: float) -> int:
            routed[job.index] = now
            return super().choose(job, now)

    made = requests(*((one.at, one.num_prompt, one.num_output, one.adapter) for one in asked))
    outcome = Simulator(made, costs, Policy("x", Noting(6, 0), Fixed(3)), initial=3, size=3).run()
    return [
        Seen(*one, first=one.at + ttft, last=one.at + end, routed=routed[i], replica=f"r{slot}")
        for i, (one, ttft, end, slot) in enumerate(
            zip(asked, outcome.ttft_R.tolist(), outcome.end_R.tolist(), outcome.slot_R.tolist(), strict=True)
        )
    ]


def test_costs_are_found_again() -> None:
    made = _made(200)
    crowd = Crowd(made, PROCESSORS)
    between, rows, slowed = decoding(made, crowd)
    assert set(np.round(rows, 6)) == {1.0, 2.0}
    assert between.min() == pytest.approx(STEP + ROW)
    waits = undisturbed(made, crowd)
    assert len(waits.prompt) == 100  # those beside another's are left out
    assert waits.cold.sum() == 3
    assert not any(column.any() for column in (waits.decoding, waits.beside, slowed[:, 1]))
    assert (waits.shared == 1.0).all()
    costs = fit(made, [], MOST, PROCESSORS)
    assert (costs.step, costs.row, costs.prompt) == (pytest.approx(STEP), pytest.approx(ROW), pytest.approx(PROMPT))
    assert np.allclose(costs.outside.sum(axis=1), OUTSIDE)
    assert np.allclose(costs.outside[:, 2], 0.0)
    assert costs.factors == pytest.approx(1.0)
    assert costs.pair == pytest.approx(0.0, abs=1e-12)
    assert np.isnan(costs.load)


@pytest.mark.parametrize("processors", [2, 8])
def test_what_a_simulation_was_given_is_found_in_its_requests(processors: int) -> None:
    """Loads, contention and steps of long prompts included. The requests are the benchmark's."""
    given = SMOLLM2_TWO_CORES.model_copy(
        update={"step_s": 6e-4, "decode_s": 1e-4, "adapter_s": 0.0, "prompt_s": 7e-6, "pair_s": 1e-8, "load_s": 0.003,
                "load_byte_s": 0.0, "place_s": 2e-4, "place_byte_s": 0.0, "contention": 0.4, "processors": processors,
                "outside_s": ((0.005, 0.001, 0.0), (0.006, 0.002, 0.0), (0.006, 0.002, 0.002)),
                "prompt_factors": (0.8, 0.9, 1.0, 1.3)}
    )  # fmt: skip
    asked = make_trace(Load(num_adapters=200, probe_rate=8.0)).counted
    costs = fit(_simulated_answers(given, asked), [], given.max_num_batched_tokens, processors)
    assert costs.contention == pytest.approx(given.contention, abs=0.08)
    assert costs.step + costs.row == pytest.approx(7e-4, rel=0.05)
    assert costs.load == pytest.approx(0.0032, rel=0.15)
    assert np.quantile(costs.outside.sum(axis=1), (0.1, 0.5, 0.9)) == pytest.approx([0.006, 0.008, 0.01], rel=0.1)
    assert costs.outside.mean(axis=0)[:2] == pytest.approx([0.0057, 0.0017], abs=0.0005)
    assert costs.outside[-40:, 2].mean() == pytest.approx(0.002, abs=0.0005)
    assert np.quantile(costs.factors, (0.1, 0.9)) == pytest.approx([0.8, 1.3], abs=0.1)
    for tokens in (500, 3000):
        found = tokens * costs.prompt + tokens**2 / 2 * costs.pair
        assert found == pytest.approx(tokens * given.prompt_s + tokens**2 / 2 * given.pair_s, rel=0.1)


def test_how_late_a_router_knows_of_ends_is_in_what_it_knew() -> None:
    """One request comes a second; who knows half a request too many in the mean knows of ends half a second late."""
    made = [seen(float(i), routed=float(i), first=i + 0.1, last=i + 0.2) for i in range(101)]
    assert end_known_s(made) == 0.0
    for i, one in enumerate(made):
        one.loads = (1, i % 2)
    assert end_known_s(made) == pytest.approx(0.5, rel=0.02)


def test_a_request_may_come_while_others_decode() -> None:
    long = seen(0.0, first=0.02, last=9.0)
    made = [long, *(probe(float(i), first=i + 0.1) for i in range(1, 4)), probe(4.0, first=4.2), seen(4.1, first=4.3)]
    assert undisturbed(made, Crowd(made, PROCESSORS)).decoding.tolist() == [1.0, 1.0, 1.0]


def test_others_work_beside_it_on_their_way_and_as_replicas() -> None:
    def beside(seen: Sequence[Seen], end: float) -> float:
        shared, found = Crowd(seen, PROCESSORS).slowdown(0.0, end)
        assert shared == 1.0, "there is a processor for each"
        return found

    one = seen(0.0, routed=1.0, first=4.0, last=9.0)
    others = [seen(0.0, routed=3.0, first=9.0, last=9.0, replica="b"), seen(2.0, routed=2.0, last=9.0)]
    assert beside([one], 4.0) == 0.0
    # The way of one until 3, then its replica; of the other only a replica that has the request itself.
    assert beside([one, *others], 4.0) == pytest.approx(1.0)
    # Before it has the request its replica works as any other.
    earlier = seen(-1.0, routed=-0.5, first=0.0, last=0.5)
    assert beside([one, earlier], 1.0) == pytest.approx(0.5)
    both = [seen(-1.0, routed=-0.5, last=0.5, replica="b"), seen(-1.0, routed=-0.5, last=0.25, replica="b")]
    assert beside([one, *both], 1.0) == pytest.approx(0.5)


def test_more_than_processors_share_them() -> None:
    """Three at work for half of the time, of which each has two thirds of a processor; then one."""
    made = [seen(0.0, routed=0.0, last=1.0, replica=name) for name in "bc"] + [seen(0.0, routed=0.0, last=2.0)]
    assert Crowd(made, 2).slowdown(0.0, 2.0) == pytest.approx((0.5 * 1.5 + 0.5, 0.5 * 1.5))
    assert Crowd(made, 1).slowdown(0.0, 2.0) == pytest.approx((0.5 * 3 + 0.5, 0.0))


def test_a_probe_that_waited_long_stands_for_those_that_another_prompt_came_beside() -> None:
    made = [probe(float(i), routed=float(i), first=i + wait) for i, wait in enumerate([0.1, 0.6] * 20)]
    waits = undisturbed(made, Crowd(made, PROCESSORS))
    assert waits.weight[1] / waits.weight[0] == pytest.approx(np.exp(0.5 * 40 / 39))


def test_costs_that_cannot_be_told_are_an_error() -> None:
    made = _made(200)
    with pytest.raises(ValueError, match="--probe-rate"):
        fit(made[:20], [], MOST, PROCESSORS)
    for one in made:
        one.first = one.at + 0.1
        one.last = one.first + 0.05
    with pytest.raises(ValueError, match="other processes"):
        fit(made, [], MOST, PROCESSORS)


def test_a_profile_has_the_sizes_of_the_pool() -> None:
    after = _figures(blocks={"free": 64, "kv": 32, "layered": 32}, adapters_in_pool=("x", "y"), num_loads=4,
                     num_loaded_bytes=80_000)  # fmt: skip
    made = profile(fit(_made(100), [], MOST, PROCESSORS), 0.003, after, SPEC, "a test", PROCESSORS)
    assert made.adapter_bytes == (16 * 8192,)
    assert made.kv_token_bytes == 512
    assert made.host_bytes == pytest.approx(200_000 * 16 * 8192 / 20_000)
    assert made.load_seconds(1e9) + made.place_seconds(1e9) == pytest.approx(0.003)


def test_the_profile_is_that_of_the_probes(tmp_path: Path) -> None:
    """Of others than probes no time is used."""
    trace = make_trace(Load(num_adapters=20, seconds=10.0))
    (tmp_path / "trace.jsonl").write_text('{"timestamp": 0, "input_length": 8, "output_length": 2, "adapter": 0}\n')
    others = [seen(200.0 + i, first=i + 200.5, last=i + 200.9) for i in range(20)]
    counted = [*_made(100), *others]
    made = row("loray", counted, counted, 0, _figures(), _figures(), 0.0)
    assert made.p50_ttft_s == pytest.approx(0.5)
    run = Run(made, [], counted, 0.003, _figures())
    with pytest.raises(RuntimeError, match="warm-up"):
        _simulated([run], trace, SPEC, tmp_path, 3)
    found = Profile.model_validate_json((tmp_path / "profile-loray.json").read_bytes())
    assert [sum(outside) for outside in found.outside_s] == pytest.approx([OUTSIDE] * len(found.outside_s))
    assert found.load_s + found.place_s == pytest.approx(0.003)
