"""Starts a base's trainer as a named Ray actor that outlives its callers, or finds it."""

from __future__ import annotations

from typing import Any

import ray
from ray.actor import ActorHandle

from loray.settings import Settings
from loray.spec import ACTOR_NAMESPACE, AnyDType, trainer_actor


def trainer_of(base: str, dtype: AnyDType = "auto") -> ActorHandle:
    """Start or find the trainer of the base with this name; `jobs.trainer.actor.Trainer` has its methods. It takes a
    GPU where one is free, and else a CPU. Blocks for a moment; a method's first call waits until the base is loaded.

    After a kill Ray starts it again, and sends the calls again that had no answer: they only wait. `dtype` is that of
    one that is started.
    """
    name = trainer_actor(base)
    try:
        return ray.get_actor(name, namespace=ACTOR_NAMESPACE)
    except ValueError:  # there is none
        # In a process of its own: callers need no torch.
        ray.get(ray.remote(_start).options(num_cpus=0).remote(name, base, dtype))
        return ray.get_actor(name, namespace=ACTOR_NAMESPACE)


def _start(name: str, base: str, dtype: AnyDType) -> None:
    from jobs.trainer.actor import Trainer

    takes: dict[str, Any] = {"num_cpus": 1}
    if (group := Settings.from_env().training_group) is not None:
        worker = dict(group.worker)
        takes = {"num_cpus": worker.pop("CPU", 0), "resources": worker}
    if ray.available_resources().get("GPU", 0) >= 1:
        takes["num_gpus"] = 1
    ray.remote(Trainer).options(
        name=name,
        namespace=ACTOR_NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=-1,
        **takes,
    ).remote(base, dtype, name)
