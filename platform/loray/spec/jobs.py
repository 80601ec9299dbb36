"""Training jobs: their status, as the catalog records it, and the nodes that are for them alone."""

from __future__ import annotations

from typing import Literal, NamedTuple

JobStatus = Literal["pending", "running", "succeeded", "failed", "stopped"]
EndStatus = Literal["succeeded", "failed", "stopped"]


def has_ended(status: JobStatus) -> bool:
    return status not in ("pending", "running")


class TrainingGroup(NamedTuple):
    """A group of a Ray cluster's nodes (KubeRay's worker group of this name) on which drivers and workers of jobs run,
    and nothing else. Its nodes offer the two resources below and no CPU, so that no engine fits on them.
    """

    name: str

    @property
    def driver(self) -> dict[str, float]:
        """What a job's driver takes: one a node, so that a node with a driver is not idle for Ray's autoscaler."""
        return {f"{self.name}_driver": 1.0}

    @property
    def worker(self) -> dict[str, float]:
        """What each of a job's workers takes, instead of a CPU."""
        return {f"{self.name}_worker": 1.0}

    @property
    def others(self) -> dict[str, str]:
        """Ray's label selector of all nodes outside the group."""
        return {"ray.io/node-group": f"!{self.name}"}
