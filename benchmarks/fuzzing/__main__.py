"""Random requests by schema, with keys of every kind, while ten tenants stream.

    python -m benchmarks.fuzzing                      10,000 requests
    python -m benchmarks.fuzzing --requests 300 --seed 7

A cluster of two nodes with two gateways and the catalog's API behind HAProxy, two replicas of a tiny model, the catalog
in PostgreSQL, adapters in S3. docs/benchmarks/faults.md explains what is asked. The exit code is 1 where it was not
reached.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from benchmarks.cluster import world
from benchmarks.fuzzing.callers import NUM_STREAMS
from benchmarks.fuzzing.trial import Place, Plan, run
from benchmarks.machine import describe_machine
from benchmarks.options import one_or_more
from benchmarks.output import machine_line, write_json
from benchmarks.processes import tree
from loray.catalog import Catalog
from loray.local.processes import free_ports, session_members
from loray.spec import FleetSpec, ServeSpec
from loray.store.s3 import create_bucket
from serve_apps.deployment import serve_config
from tests.fixtures.nodes import Node
from tests.fixtures.postgres import start_postgres
from tests.fixtures.s3 import started_s3

NUM_GATEWAYS = NUM_REPLICAS = 2
_POSTGRES = ("fsync=off", "max_connections=200", "shared_buffers=32MB")
_POOL_BYTES, _HOST_BYTES = 64 << 20, 8 << 20  # for all hostile answers beside the streams


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that all servers are ended
    machine = describe_machine()
    click.echo(machine_line(machine))
    with _started() as place:
        found = run(place, Plan(args.requests, args.seed, args.at_once, args.nice), click.echo)
    failures = found.failures()
    click.echo("\n".join(found.lines()))
    click.echo("FAILED" if failures else "passed")
    click.echo("\n".join(failure[:2000] for failure in failures[:40]))
    write_json(args.json, {"machine": machine, "failures": failures} | found.to_json())
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--requests", type=one_or_more, default=10_000, help="(default %(default)d)")
    add("--seed", type=int, default=0)
    add("--at-once", type=one_or_more, default=8, help="hostile requests under way (default %(default)d)")
    add("--nice", type=int, default=0, help="of the hostile client, which has no machine of its own here (0 to 19)")
    add("--json", type=Path, help="write the figures there too")
    return parser


@contextmanager
def _started() -> Iterator[Place]:
    with start_postgres(_POSTGRES) as postgres, started_s3() as s3:
        location = s3.location("adapters")
        create_bucket(location)
        environment = {"LORAY_CATALOG": postgres.new_database(), "LORAY_STORE": location.url}
        with world.started(NUM_STREAMS, 1, environment) as cluster, _second_node(cluster) as node:

            def processes() -> list[int]:
                sessions = (cluster.local.pid, node.pid, s3.pid)
                return [pid for number in sessions for pid in session_members(number)] + tree(postgres.pid)

            (port,) = free_ports(1)
            spec = ServeSpec(
                base=world.BASE,
                dtype="float32",
                num_threads=1,
                num_replicas=NUM_REPLICAS,
                num_gateways=NUM_GATEWAYS,
                pool_bytes=_POOL_BYTES,
                host_bytes=_HOST_BYTES,
                port=port,
            )
            with cluster.running(serve_config(FleetSpec.of(spec), cluster.settings)):
                yield Place(
                    port,
                    Catalog(cluster.settings.catalog),
                    world.BASE,
                    cluster.names,
                    processes,
                    cluster.folder,
                )


@contextmanager
def _second_node(cluster: world.World) -> Iterator[Node]:
    environment = cluster.settings.to_env() | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    node = Node(cluster.local, cluster.folder / "node.log", environment, num_cpus=1)
    try:
        yield node
    finally:
        node.kill()


if __name__ == "__main__":
    sys.exit(main())
