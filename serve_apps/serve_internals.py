"""Private parts of Ray Serve that are used here.

Other modules import Serve's private classes and functions from here. What they call or override of Serve's objects
stands in PRIVATE. It is compared with the installed Ray where this module is imported, which the applications do.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any, NamedTuple

import ray

from loray.errors import ClusterError
from loray.locations import is_on_loopback

__all__ = ["PRIVATE", "DeploymentConfig", "Private", "_get_global_client", "check"]


class Private(NamedTuple):
    """`path`: a function, a class, or a class's method or attribute in `module`. `parameters` are those that it is
    called with by name or by position; None: it is an attribute, which the class's constructor sets.
    """

    module: str
    path: str
    parameters: tuple[str, ...] | None = ()


_TIMEOUT_S = 30.0
_ROUTER, _HANDLE = "ray.serve.request_router", "ray.serve.handle"

PRIVATE = (
    Private("ray.serve._private.config", "DeploymentConfig.to_proto"),
    Private(
        "ray.serve", "Deployment.__init__", ("name", "deployment_config", "replica_config", "version", "_internal")
    ),
    Private("ray.serve", "Deployment._deployment_config", None),
    Private("ray.serve", "Deployment._replica_config", None),
    Private("ray.serve.context", "_get_global_client"),
    Private("ray.serve._private.client", "ServeControllerClient._controller", None),
    Private(_HANDLE, "DeploymentBroadcastResponse._fetch_replica_results_async"),
    Private(_HANDLE, "DeploymentResponseGenerator._fetch_future_result_async"),
    Private(_HANDLE, "DeploymentResponseGenerator._replica_result_future", None),
    Private(_ROUTER, "RequestRouter._deployment_id", None),
    Private(_ROUTER, "RequestRouter._get_pending_request_matching_internal_request_id", ("request_metadata",)),
    Private(_ROUTER, "RequestRouter._pending_requests_to_fulfill", None),
    # Without an underscore, and not in Serve's documentation: an override that Serve does not call would count nothing.
    Private(_ROUTER, "RequestRouter.on_replica_actor_unavailable", ("replica_id",)),
    Private(_ROUTER, "RequestRouter.update_replicas", ("replicas",)),
)


def check() -> None:
    """Raise ClusterError where the installed Ray has one of PRIVATE not, or with other parameters."""
    for private in PRIVATE:
        if (problem := _problem(private)) is not None:
            raise ClusterError(
                f"loray does not run on Ray {ray.__version__}, whose {private.module}.{private.path} {problem}; "
                "install the Ray that loray's package asks for"
            )


def _problem(private: Private) -> str | None:
    try:
        owner: Any = import_module(private.module)
        *outer, name = private.path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        if private.parameters is None:
            return None if _is_set(owner, name) else "is not there"
        found = getattr(owner, name)
    except (ImportError, AttributeError):
        return "is not there"
    taken = inspect.signature(found).parameters
    missing = [p for p in private.parameters if p not in taken]
    return f"has no parameter {missing[0]!r}" if missing else None


def _is_set(owner: Any, name: str) -> bool:
    """Tell whether the constructor of the class, or of one that it is derived from, sets the attribute."""
    return any(
        name in base.__dict__["__init__"].__code__.co_names for base in owner.__mro__ if "__init__" in vars(base)
    )


def reachable_host(stated: str) -> str:
    """Return the host for which keys are decided: `stated`, the application's, unless others can reach Serve's own.

    Called in a replica. Both must be loopback for a server that needs no key.
    """
    host = _host_of_serve()
    return stated if is_on_loopback(host) else host


def _host_of_serve() -> str:
    controller = _get_global_client()._controller
    options = ray.get(controller.get_http_config.remote(), timeout=_TIMEOUT_S)
    return str(options.host)


check()

from ray.serve._private.config import DeploymentConfig  # noqa: E402 - checked first; no public option sets a version
from ray.serve.context import _get_global_client  # noqa: E402 - no public call tells the options of the proxies
