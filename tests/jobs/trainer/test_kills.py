"""The trainer's actor is killed at random points, and no step is lost or done twice."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread
from typing import Any

import pytest
import ray
from ray.actor import ActorHandle

from jobs.trainer import TrainerClient, trainer_of
from loray.bases.registry import BaseModel
from loray.spec import ACTOR_NAMESPACE, trainer_actor
from loray.spec.datums import AdamParams, ForwardBackward, LossOutput, OptimStep
from tests.fixtures.cluster import RayCluster
from tests.jobs.trainer.conftest import SPECS, datum

pytestmark = pytest.mark.cluster
WAIT_S = 120.0
Begin = Callable[..., "Future[Any]"]  # a call of a method


@pytest.fixture
def trainer(ray_cluster: RayCluster, cluster_base: BaseModel) -> Iterator[ActorHandle]:
    found = trainer_of(cluster_base.name, "float32")
    yield found
    ray.kill(ray.get_actor(trainer_actor(cluster_base.name), namespace=ACTOR_NAMESPACE), no_restart=True)


@contextmanager
def calling(actor: ActorHandle, way: str) -> Iterator[Begin]:
    """Begin calls by Ray, or over the trainer's socket."""
    if way == "Ray":
        yield lambda method, *arguments: getattr(actor, method).remote(*arguments).future()
        return
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()
    client = TrainerClient(actor)
    yield lambda method, *arguments: asyncio.run_coroutine_threadsafe(getattr(client, method)(*arguments), loop)
    assert client._calls is not None, "it has called by Ray"
    asyncio.run_coroutine_threadsafe(ended(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def ended() -> None:
    """End the connection, which stands as long as its loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.sleep(0)


def op_of(model: str, seq: int) -> ForwardBackward | OptimStep:
    if seq % 2:
        return ForwardBackward(model, (datum(seq % 4), datum(seq % 4 + 500, 6)))  # two batches in turn
    return OptimStep(model, AdamParams(learning_rate=5e-3))


@pytest.mark.parametrize(
    ("num_steps", "num_kills", "way"),
    [(8, 1, "Ray"), (8, 1, "socket"), pytest.param(60, 10, "socket", marks=pytest.mark.slow)],
)
def test_a_killed_trainer_does_each_step_once(trainer: ActorHandle, num_steps: int, num_kills: int, way: str) -> None:
    """Callers see nothing of it but that they wait."""
    with calling(trainer, way) as begin:
        check_kills(begin, num_steps, num_kills)


def check_kills(begin: Begin, num_steps: int, num_kills: int) -> None:
    def call(method: str, *arguments: Any) -> Any:
        return begin(method, *arguments).result(WAIT_S)

    def kill() -> None:
        os.kill(call("status")["pid"], signal.SIGKILL)

    def run(model: str, kills: dict[int, str]) -> list[float]:
        call("create", model, SPECS["one"], 7, None)
        losses = []
        for seq in range(1, 2 * num_steps + 1):
            moment = kills.get(seq)
            if moment == "before":
                kill()
            call("submit", model, seq, op_of(model, seq))
            if moment == "accepted":
                kill()
            asked = begin("result", model, seq, WAIT_S)
            if moment == "asked":
                kill()
            result = asked.result(WAIT_S)
            if isinstance(result, LossOutput):
                losses.append(result.loss)
            else:
                assert result["num_updates"] == seq / 2
        assert call("status")["models"][model]["step"] == num_steps
        return losses

    chance = random.Random(num_steps)
    moments = {
        n: chance.choice(["before", "accepted", "asked"]) for n in chance.sample(range(2, 2 * num_steps), num_kills)
    }
    whole = run("whole", {})
    assert whole[-2] < whole[0]
    assert run("killed", moments) == pytest.approx(whole, abs=1e-5)
    again = trainer_of(call("status")["base"])
    ray.get([again.remove.remote("whole"), again.remove.remote("killed")], timeout=WAIT_S)
