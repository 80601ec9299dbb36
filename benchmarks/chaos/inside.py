"""A driver of the cluster: one question, whose answer it prints as JSON, or clocks that jump.

    python -m benchmarks.chaos.inside jump 3600    the clocks of all gateways and replicas go by so many seconds, until
                                                   its standard input has a line, or ends
    python -m benchmarks.chaos.inside held [emptied]    what their processes hold, and the cluster's actors and groups

A process of its own, because a connection to the cluster does not outlive each fault that is tried on it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import partial
from typing import Any

import click
import ray
from ray.util import placement_group_table

from benchmarks.chaos.world import ENGINE, MOVED, PARALLEL
from serve_apps.deployment import APPLICATION, GATEWAY
from tests.serve_apps.chaos import spy

_ASK_S = 60


def _set_clocks(seconds: float) -> None:
    _each(partial(_jump, seconds=seconds))


def held(emptied: bool) -> dict[str, dict[str, Any]]:
    """By process: see `spy.held`; and the number of actors of each class, and of placement groups."""
    from ray.util.state import list_actors

    actors = Counter(actor.class_name for actor in list_actors(filters=[("state", "=", "ALIVE")], limit=1000))
    groups = sum(group["state"] != "REMOVED" for group in placement_group_table().values())
    return _each(partial(_held, emptied=emptied)) | {"cluster": dict(actors) | {"placement groups": groups}}


def _each(ask: Any) -> dict[str, Any]:
    found = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        _, _, name = actor["name"].partition("SERVE_REPLICA::")
        application, _, rest = name.partition("#")
        if application in (APPLICATION, PARALLEL):
            handle = ray.get_actor(actor["name"], namespace=actor["namespace"])
            kind = rest.partition("#")[0]
            assert kind in (ENGINE, GATEWAY), kind
            found[f"{application} {kind} {rest.rpartition('#')[2]}"] = ray.get(
                handle.__ray_call__.remote(partial(ask, kind=kind)), timeout=_ASK_S
            )
    return found


def _held(_: object, *, emptied: bool, kind: str) -> dict[str, int]:
    return spy.held(emptied=emptied and kind.startswith("engine"))


def _jump(_: object, *, seconds: float, kind: str) -> int:
    import time

    real = getattr(time, "_chaos_real", time.time)
    time._chaos_real = real  # type: ignore[attr-defined]
    time.time = (lambda: real() + seconds) if seconds else real
    return 0


def main() -> None:
    ray.init(log_to_driver=False, logging_level="ERROR")
    for module in (spy, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)  # the replicas cannot import them
    if sys.argv[1] == "jump":
        _set_clocks(float(sys.argv[2]))
        click.echo(MOVED)
        sys.stdin.readline()
        _set_clocks(0.0)
    else:
        click.echo(json.dumps(held("emptied" in sys.argv)))


if __name__ == "__main__":
    main()
