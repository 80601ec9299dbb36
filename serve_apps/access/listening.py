"""Where Serve takes requests, which its own configuration says, and not an application's arguments."""

from __future__ import annotations

import ray

from loray.locations import is_on_loopback
from serve_apps.serve_internals import _get_global_client

_TIMEOUT_S = 30.0


def reachable_host(stated: str) -> str:
    """The host for which keys are decided: `stated`, the application's, unless Serve listens where others can reach it.

    Called in a replica. Both must be loopback for a server that needs no key.
    """
    host = _host_of_serve()
    return stated if is_on_loopback(host) else host


def _host_of_serve() -> str:
    controller = _get_global_client()._controller
    options = ray.get(controller.get_http_config.remote(), timeout=_TIMEOUT_S)
    return str(options.host)
