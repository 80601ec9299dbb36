"""The trainer's actor is killed at random points, and no step is lost or done twice."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.actor import ActorHandle

from jobs.trainer import trainer_of
from loray.bases.registry import BaseModel
from loray.spec import ACTOR_NAMESPACE, trainer_actor
from loray.spec.datums import AdamParams, ForwardBackward, LossOutput, OptimStep
from tests.fixtures.cluster import RayCluster
from tests.jobs.trainer.conftest import SPECS, datum

pytestmark = pytest.mark.cluster
WAIT_S = 120.0


@pytest.fixture
def trainer(ray_cluster: RayCluster, cluster_base: BaseModel) -> Iterator[ActorHandle]:
    found = trainer_of(cluster_base.name, "float32")
    yield found
    ray.kill(ray.get_actor(trainer_actor(cluster_base.name), namespace=ACTOR_NAMESPACE), no_restart=True)


def call(actor: ActorHandle, method: str, *arguments: Any) -> Any:
    return ray.get(getattr(actor, method).remote(*arguments), timeout=WAIT_S)


def op_of(model: str, seq: int) -> ForwardBackward | OptimStep:
    if seq % 2:
        return ForwardBackward(model, (datum(seq % 4), datum(seq % 4 + 500, 6)))  # two batches in turn
    return OptimStep(model, AdamParams(learning_rate=5e-3))


@pytest.mark.parametrize(("num_steps", "num_kills"), [(8, 1), pytest.param(60, 10, marks=pytest.mark.slow)])
def test_a_killed_trainer_does_each_step_once(trainer: ActorHandle, num_steps: int, num_kills: int) -> None:
    """Callers see nothing of it but that they wait."""

    def kill() -> None:
        os.kill(call(trainer, "status")["pid"], signal.SIGKILL)

    def run(model: str, kills: dict[int, str]) -> list[float]:
        call(trainer, "create", model, SPECS["one"], 7, None)
        losses = []
        for seq in range(1, 2 * num_steps + 1):
            moment = kills.get(seq)
            if moment == "before":
                kill()
            call(trainer, "submit", model, seq, op_of(model, seq))
            if moment == "accepted":
                kill()
            asked = trainer.result.remote(model, seq, WAIT_S)
            if moment == "asked":
                kill()
            result = ray.get(asked, timeout=WAIT_S)
            if isinstance(result, LossOutput):
                losses.append(result.loss)
            else:
                assert result["num_updates"] == seq / 2
        assert call(trainer, "status")["models"][model]["step"] == num_steps
        return losses

    chance = random.Random(num_steps)
    moments = {
        n: chance.choice(["before", "accepted", "asked"]) for n in chance.sample(range(2, 2 * num_steps), num_kills)
    }
    whole = run("whole", {})
    assert whole[-2] < whole[0]
    assert run("killed", moments) == pytest.approx(whole, abs=1e-5)
    again = trainer_of(call(trainer, "status")["base"])
    call(again, "remove", "whole")
    call(again, "remove", "killed")
