"""The ranks of a replica's engine other than 0: actors in the replica's placement group (`loray.engine.parallel`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.util import get_current_placement_group, get_node_ip_address, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from loray.bases.registry import BaseModel, get_base
from loray.errors import EngineError
from loray.local.processes import LOOPBACK
from loray.settings import Settings
from loray.spec import ServeSpec
from loray.telemetry import configure_logging

if TYPE_CHECKING:
    from loray.engine.parallel.worker import WorkerArgs


def bundles(spec: ServeSpec) -> list[dict[str, float]]:
    """Return the resources of each rank of a replica. The first bundle is rank 0's, the replica itself."""
    bundle = {"CPU": 1.0} | ({"GPU": 1.0} if spec.device.startswith("cuda") else {})
    return [bundle] * spec.tensor_parallel_size


class RankActor:
    """Runs one rank, with the base on its own node."""

    def run(self, args: WorkerArgs) -> None:
        """Run until rank 0 has ended. It listens at loopback where rank 0 does."""
        settings = Settings.from_env()
        configure_logging(settings.log_level)
        os.environ["OMP_NUM_THREADS"] = str(args.spec.num_threads)  # before torch is imported: it is read once
        from loray.engine.parallel.worker import run_worker

        own_address = LOOPBACK if args.host == LOOPBACK else get_node_ip_address()
        run_worker(args, get_base(settings.home, args.spec.base), own_address)


class RankActors:
    """Implements `loray.engine.parallel.worker.Workers`. The actors end with the replica, which owns them."""

    def __init__(self, args: Sequence[WorkerArgs], base: BaseModel) -> None:
        group = get_current_placement_group()
        assert group is not None, "the deployment gives each rank a bundle"
        self._actors: list[Any] = []
        for arg, bundle in zip(args, bundles(args[0].spec)[1:], strict=True):
            options = {
                "num_cpus": bundle["CPU"],
                "num_gpus": bundle.get("GPU", 0),
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=arg.rank),
            }
            self._actors.append(ray.remote(RankActor).options(**options).remote())
        self._runs = [a.run.remote(arg).future() for a, arg in zip(self._actors, args, strict=True)]

    @staticmethod
    def own_address() -> str:
        nodes = placement_group_table(get_current_placement_group())["bundles_to_node_id"]
        return LOOPBACK if len(set(nodes.values())) == 1 else str(get_node_ip_address())

    def check(self) -> None:
        for rank, run in enumerate(self._runs, 1):
            if run.done():
                raise EngineError(f"rank {rank} of the engine has ended: {run.exception() or 'it lost rank 0'}")

    def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
