"""Deployment through Ray Serve's REST API: the applications' configuration, state and end. Needs no Ray driver."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loray.errors import ClusterError
from loray.local.serving import ServingAddress
from loray.locations import http_url
from loray.settings import Settings
from loray.spec import APPLICATION, FleetSpec

IMPORT_PATH = "serve_apps.app:build"
CATALOG_APPLICATION = "catalog"
CATALOG_PREFIX = "/api/v1"
CATALOG_IMPORT_PATH = "serve_apps.api.app:build"
TINKER_APPLICATION = "tinker"
TINKER_PREFIX = "/tinker"
TINKER_IMPORT_PATH = "serve_apps.tinker.app:build"
# Those that write to the store are on a node with no engine, so that its identity can be another one.
ON_THE_HEAD = {"node:__internal_head__": 0.001}
DRAIN_S = 120.0  # time for requests under way to end before their replica or gateway is removed
DRAIN_LOOK_S = 0.2  # between two looks whether they have ended
_POLL_S = 0.5
_OUR_ERROR = re.compile(r"^\s*loray\.errors\.\w+: (.+)$", re.MULTILINE)
_REASON_LINES = 12


def serve_config(fleet: FleetSpec, settings: Settings) -> dict[str, Any]:
    """Make the configuration of `serve deploy` (ServeDeploySchema): engines with their gateways, the catalog's REST
    API, and the front of Tinker's protocol.

    Ray's dashboard shows it, so passwords are not sent to another cluster: its nodes have their own LORAY_CATALOG.
    """
    env = settings.to_remote_env() if settings.is_remote else settings.to_env()
    runtime_env = {"env_vars": env | settings.to_serving_env()}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": fleet.host, "port": fleet.port},
        "logging_config": {"enable_access_log": False},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": fleet.to_args(),
                "runtime_env": runtime_env,
            },
            {
                "name": CATALOG_APPLICATION,
                "route_prefix": CATALOG_PREFIX,
                "import_path": CATALOG_IMPORT_PATH,
                "args": {"host": fleet.host, "port": fleet.port},
                "runtime_env": runtime_env,
            },
            {
                "name": TINKER_APPLICATION,
                "route_prefix": TINKER_PREFIX,
                "import_path": TINKER_IMPORT_PATH,
                "args": {"host": fleet.host},
                "runtime_env": runtime_env,
            },
        ],
    }


def front_nodes(settings: Settings) -> dict[str, str]:
    """Return Ray's label selector of gateways' nodes; empty: all. Engines need none: they take a CPU, which the
    nodes of other groups do not offer.
    """
    if settings.front_group is not None:
        return {"ray.io/node-group": settings.front_group}
    return {} if settings.training_group is None else settings.training_group.others


@dataclass(frozen=True, slots=True)
class ApplicationState:
    """The state of all applications together. `status` is the worst one.

    `replicas`: deployment → state → count. `deployed_at` changes with every deployment.
    """

    status: str
    message: str
    deployed_at: float
    replicas: dict[str, dict[str, int]]

    @property
    def is_running(self) -> bool:
        return self.status == "RUNNING"

    @property
    def has_failed(self) -> bool:
        return self.status == "DEPLOY_FAILED"

    @property
    def reason(self) -> str:
        """The reason of a failure: the message of loray's last error, or else the end of Ray's message."""
        errors = _OUR_ERROR.findall(self.message)
        return errors[-1] if errors else "\n".join(self.message.strip().splitlines()[-_REASON_LINES:])

    def __str__(self) -> str:
        parts = []
        for deployment, states in sorted(self.replicas.items()):
            parts.append(f"{deployment} " + (", ".join(f"{n} {s.lower()}" for s, n in sorted(states.items())) or "…"))
        return f"{self.status.lower().replace('_', ' ')}{': ' if parts else ''}{'; '.join(parts)}"


class ServeApi:
    """Serve on the cluster whose dashboard is at `address`. Raises ClusterError if it does not answer."""

    def __init__(self, address: str) -> None:
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient  # late: importing Ray takes a second

        self.dashboard = http_url(address)
        try:
            self._client = ServeSubmissionClient(self.dashboard)
        except ConnectionError as e:
            raise ClusterError(f"no Ray dashboard answers at {self.dashboard}; start the cluster first") from e

    def deploy(self, config: dict[str, Any]) -> None:
        try:
            self._client.deploy_applications(config)
        except RuntimeError as e:
            raise ClusterError(f"Ray Serve refused the deployment: {e}") from e

    def delete(self) -> None:
        self._client.delete_applications()

    def http(self) -> ServingAddress | None:
        """Return where Serve listens; None if it does not run. It keeps its port until it is deleted."""
        options = self._details().get("http_options") or {}
        return ServingAddress(options["host"], options["port"]) if options.get("port") else None

    def state(self) -> ApplicationState | None:
        """Read the state of loray's applications; None if they are not deployed."""
        deployed = self._details().get("applications", {})
        if APPLICATION not in deployed:
            return None
        ours = (APPLICATION, CATALOG_APPLICATION, TINKER_APPLICATION)
        return combined([deployed[name] for name in ours if name in deployed])

    def watch(self, timeout_s: float) -> Iterator[ApplicationState]:
        """Yield states as they change, until one is running or failed.

        ClusterError with the last message if that takes longer than `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        last: ApplicationState | None = None
        while time.monotonic() < deadline:
            state = self.state()
            if state is not None and state != last:
                last = state
                yield state
            if state is not None and (state.is_running or state.has_failed):
                return
            time.sleep(_POLL_S)
        raise ClusterError(
            f"serving did not come up within {timeout_s:.0f} s; it goes on trying, see `loray status`"
            + (f"\n{last.reason}" if last and last.message else "")
        )

    def has_running_jobs(self) -> bool:
        """Tell whether jobs run on the cluster, which must not be stopped then."""
        from jobs.submission.server import RayJobServer

        return RayJobServer(lambda: self.dashboard).has_running_jobs()

    def _details(self) -> dict[str, Any]:
        try:
            return dict(self._client.get_serve_details())
        except (RuntimeError, OSError) as e:
            raise ClusterError(f"Ray Serve's state cannot be read at {self.dashboard}: {e}") from e


def combined(applications: Sequence[Mapping[str, Any]]) -> ApplicationState:
    """Combine the states of several applications, from Serve's ApplicationDetails."""
    replicas: dict[str, dict[str, int]] = {}
    messages: list[str] = []
    for application in applications:
        messages.append(application.get("message") or "")
        for name, deployment in application.get("deployments", {}).items():
            states: dict[str, int] = {}
            for replica in deployment.get("replicas", ()):
                states[replica["state"]] = states.get(replica["state"], 0) + 1
            replicas[name] = states
            messages.append(deployment.get("message") or "")
    statuses = [application["status"] for application in applications]
    return ApplicationState(
        status=min(statuses, key=_severity),
        message="\n".join(m for m in messages if m),
        deployed_at=max(application.get("last_deployed_time_s", 0.0) for application in applications),
        replicas=replicas,
    )


def _severity(status: str) -> int:
    """Order states, the worst first."""
    order = ("DEPLOY_FAILED", "UNHEALTHY", "NOT_STARTED", "DELETING", "DEPLOYING")
    return order.index(status) if status in order else len(order)
