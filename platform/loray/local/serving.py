"""Addresses at which `loray serve` and `loray up` answer."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from loray.errors import ClusterError
from loray.local.cluster import LocalCluster, current_cluster
from loray.local.processes import Process, alive, identity, read_state, write_state
from loray.locations import http_url
from loray.settings import Settings

_FOLDER = "serve"  # of a home: a file for each `loray serve`
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class StandaloneServer(Process):
    """A process of `loray serve`, which answers at `url`, without a path."""

    url: str


@contextmanager
def announced(home: Path, url: str) -> Iterator[None]:
    """Let others find that this process serves at `url` while the block runs."""
    file = home / _FOLDER / f"{os.getpid()}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_state(file, StandaloneServer(**identity(os.getpid()), url=url))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def standalone_servers(home: Path) -> list[StandaloneServer]:
    """The servers of this home that run now. Files of those that died are removed."""
    found = []
    for file in sorted((home / _FOLDER).glob("*.json")):
        server = alive(read_state(file, StandaloneServer))
        if server is None:
            file.unlink(missing_ok=True)
        else:
            found.append(server)
    return found


class ServingAddress(NamedTuple):
    host: str
    port: int

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def serving_urls(settings: Settings) -> list[str]:
    """The servers of this home, or of the cluster at LORAY_ADDRESS: `loray up` first, then every `loray serve`."""
    urls = []
    if settings.address is not None:
        address = _http(serve_details(http_url(settings.address)))
        if address is not None:
            urls.append(address._replace(host=urlsplit(http_url(settings.address)).hostname or address.host).url)
        return urls
    cluster = current_cluster(settings.home)
    if cluster is not None and (address := _http(serve_details(cluster))) is not None:
        urls.append(address.url)
    return urls + [server.url for server in standalone_servers(settings.home)]


def serve_details(cluster: LocalCluster | str) -> dict[str, Any]:
    """Ray Serve's ServeInstanceDetails of a cluster of this machine, or of the dashboard at a URL.

    Raises ClusterError if the dashboard does not answer.
    """
    return _read(cluster, "/api/serve/applications/", "Ray Serve's state")


def raylets(cluster: LocalCluster | str) -> list[ServingAddress]:
    """The addresses of Ray's own server on each living node. Raises ClusterError if the dashboard does not answer."""
    try:
        nodes = [node["raylet"] for node in _read(cluster, "/nodes?view=summary", "Ray's nodes")["data"]["summary"]]
        living = [node for node in nodes if node["state"] == "ALIVE"]
        return [ServingAddress(node["nodeManagerAddress"], int(node["nodeManagerPort"])) for node in living]
    except (KeyError, TypeError, ValueError) as e:
        raise ClusterError(f"Ray's dashboard tells its nodes in another form: {e!r}") from e


def _read(cluster: LocalCluster | str, path: str, what: str) -> dict[str, Any]:
    address, token = cluster, os.environ.get("RAY_AUTH_TOKEN")  # which KubeRay gives every pod
    if not isinstance(cluster, str):
        address, token = cluster.address, Path(cluster.token_file).read_text(encoding="utf-8").strip()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{address}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            return dict(json.load(response))
    except (urllib.error.URLError, OSError, ValueError) as e:
        raise ClusterError(f"{what} cannot be read at {address}: {e}; `loray down` ends a cluster that hangs") from e


def _http(details: dict[str, Any]) -> ServingAddress | None:
    options = details.get("http_options") or {}
    is_served = bool(details.get("applications")) and options.get("port")
    return ServingAddress(options["host"], options["port"]) if is_served else None
