"""The job server that this machine's commands and servers use: of LORAY_ADDRESS, else of this home's cluster."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from jobs.submission.commands import Submission
from jobs.submission.tracker import RayJob
from loray.errors import ClusterError
from loray.local.cluster import current_cluster
from loray.locations import http_url
from loray.settings import Settings

if TYPE_CHECKING:
    from jobs.submission.server import RayJobServer


class HomeJobServer:
    """Implements `jobs.submission.tracker.JobServer`. Ray is imported by the first call that finds a cluster."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._servers: dict[str, RayJobServer] = {}  # by address: a cluster that starts again has another one

    def submit(self, job: Submission, job_id: str | None = None, is_wanted: Callable[[], bool] = lambda: True) -> str:
        return self._server().submit(job, job_id, is_wanted)

    def cluster(self) -> str:
        return self._server().cluster()

    def find(self, job_id: str) -> RayJob | None:
        return self._server().find(job_id)

    def find_all(self, job_ids: Collection[str]) -> Mapping[str, RayJob]:
        return self._server().find_all(job_ids)

    def stop(self, job_id: str) -> None:
        self._server().stop(job_id)

    def logs(self, job_id: str) -> Iterator[str]:
        return self._server().logs(job_id)

    def tail(self, job_id: str, num_lines: int) -> str:
        return self._server().tail(job_id, num_lines)

    def follow(self, job_id: str) -> AsyncIterator[str]:
        return self._server().follow(job_id)

    def _server(self) -> RayJobServer:
        address = self._address()
        if address not in self._servers:
            from jobs.submission.server import RayJobServer

            self._servers[address] = RayJobServer(lambda: http_url(address))
        return self._servers[address]

    def _address(self) -> str:
        if self._settings.address is not None:
            return self._settings.address
        cluster = current_cluster(self._settings.home)
        if cluster is None:
            raise ClusterError(
                "no Ray cluster runs on this machine, and this starts none; `loray train RECIPE` starts one and trains "
                "on it"
            )
        os.environ.update(cluster.client_env)  # Ray reads the cluster's token from there
        return cluster.address
