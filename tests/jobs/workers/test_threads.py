"""What a process on a node takes of its cores."""

from __future__ import annotations

import os
import threading

import pytest

from jobs.workers import threads


def test_threads_are_those_that_the_nodes_environment_sets() -> None:
    for environ, expected in (
        (b"A=1\0OMP_NUM_THREADS=4\0B=2\0", 4),
        (b"OMP_NUM_THREADS=3,2\0", 3),
        (b"MY_OMP_NUM_THREADS=4\0", None),
        (b"OMP_NUM_THREADS=\0", None),
        (b"", None),
    ):
        assert threads.preset_threads(environ) == expected


def test_training_gives_way_with_all_threads_that_it_starts() -> None:
    before, found = os.getpriority(os.PRIO_PROCESS, 0), list[int]()

    def note() -> None:
        found.append(os.getpriority(os.PRIO_PROCESS, 0))

    def train() -> None:
        for _ in range(2):  # a process that Ray uses again
            threads.give_way()
            note()
        helper = threading.Thread(target=note)
        helper.start()
        helper.join()

    worker = threading.Thread(target=train)
    worker.start()
    worker.join()
    assert found == [15] * 3
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


@pytest.mark.cluster
def test_replicas_come_before_them(ray_cluster: object) -> None:
    """Actors and tasks run as Ray's own processes do, not behind whatever else runs on the machine."""
    import ray

    @ray.remote(num_cpus=0)
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, 0)

    assert ray.get(priority.remote()) == os.getpriority(os.PRIO_PROCESS, 0)
