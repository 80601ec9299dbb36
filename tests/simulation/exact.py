"""The same requests step by step, with the engine's scheduler, and as a fluid."""

from __future__ import annotations

from typing import Any

import numpy as np

from loray.simulation.profile import SMOLLM2_TWO_CORES, Profile
from loray.simulation.routers import RandomRouter
from loray.simulation.scalers import Fixed
from loray.simulation.simulator import Outcome, Policy, Simulator
from loray.simulation.workload import Floats, RequestTrace
from tests.fixtures.simulation import Simulation

STEP_S, TOKEN_S, PAIR_S = 0.0113, 6e-4, 2.56e-7
PROFILE = SMOLLM2_TWO_CORES.model_copy(
    update={
        "step_s": STEP_S,
        "decode_s": TOKEN_S,
        "adapter_s": 0.0,
        "prompt_s": TOKEN_S,
        "pair_s": PAIR_S,
        "load_s": 0.0,
        "load_byte_s": 0.0,
        "place_s": 0.0,
        "place_byte_s": 0.0,
    }
)


class _Steps(Simulation):
    def check_integrity(self) -> None:
        """The scheduler's own tests do."""


def by_steps(requests: RequestTrace, profile: Profile = PROFILE) -> tuple[Floats, Floats]:
    """Seconds from arrival to first token and to last."""
    sim = _Steps(
        num_blocks=1 << 16,
        step_s=STEP_S,
        token_s=TOKEN_S,
        pair_s=PAIR_S,
        max_num_seqs=profile.max_num_seqs,
        max_num_batched_tokens=profile.max_num_batched_tokens,
        itl_slo_s=profile.itl_slo_s,
    )
    made: list[Any] = []
    columns = zip(requests.at_R.tolist(), requests.prompt_R.tolist(), requests.output_R.tolist(), strict=True)
    for at, prompt, output in columns:
        while sim.scheduler.has_work and sim.now < at:
            sim.step()
        sim.now = max(sim.now, at)
        made.append(sim.add(prompt, output))
    sim.run()
    first = np.array([sim.first_token_at[r] for r in made])
    last = np.array([sim.token_times[r][-1] for r in made])
    return first - requests.at_R, last - requests.at_R


def as_fluid(requests: RequestTrace, profile: Profile = PROFILE) -> Outcome:
    """On one replica."""
    return Simulator(requests, profile, Policy("one", RandomRouter(2, 0), Fixed(1)), initial=1, size=1).run()
