"""Runs the engine and the server of `loray serve` in this process."""

from __future__ import annotations

import socket
from collections.abc import Callable

from loray.bases.registry import BaseModel
from loray.settings import Settings
from loray.spec import ServeSpec
from serve_apps.garbage import collect_when_quiet, freeze_garbage
from serve_apps.replica.startup import adapter_loader, set_num_threads, start_engine


def run(
    spec: ServeSpec,
    base: BaseModel,
    settings: Settings,
    listener: socket.socket,
    *,
    started: Callable[[], None],
    stopping: Callable[[int], None],
) -> None:
    """Serves at `listener` until a signal ends it. Raises EngineError if the engine stops before.

    started   called once the server answers
    stopping  called with the number of requests under way when the first signal comes
    """
    spec = set_num_threads(spec)
    loader = adapter_loader(base, settings)
    stream = start_engine(spec, base, settings, load=loader)
    try:
        from serve_apps.standalone.app import create_site
        from serve_apps.standalone.engines import REPLICA, LocalEngines
        from serve_apps.standalone.server import Server
        from serve_apps.tracing import open_tracing

        tracing = open_tracing("server", REPLICA)
        engines = LocalEngines(stream, tracing, loader.counts)
        site = create_site(spec, settings, engines, tracing)
        freeze_garbage()
        collect_when_quiet(lambda: stream.stats().is_idle)

        def ending(num_requests: int) -> None:
            site.end_streams()
            stopping(num_requests)

        server = Server(site, check_health=engines.check_health, started=started, stopping=ending)
        server.run(sockets=[listener])
    finally:
        stream.stop()
    if server.failure is not None:
        raise server.failure
