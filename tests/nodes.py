"""Further nodes of a cluster on this machine, which can be lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from loray.local.cluster import LocalCluster
from loray.local.processes import LOOPBACK, free_ports, kill, session_members

_END_S = 30.0
_PORTS = ("dashboard-agent-listen-port", "metrics-export-port")
_OBJECT_STORE_BYTES = 80_000_000


class Node:
    """All its processes are in a session of their own, whose number is `pid`. It has started when Ray lists it."""

    def __init__(
        self,
        local: LocalCluster,
        log_file: Path,
        env: Mapping[str, str],
        *,
        num_cpus: int = 0,
        resources: Mapping[str, float] | None = None,
    ) -> None:
        """`env`: added to this process' environment, and to the head's settings of Ray Serve: replicas and gateways run
        alike on all nodes.
        """
        self.log_file = log_file
        self._command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={local.gcs_address}"]
        self._command += ["--block", f"--num-cpus={num_cpus}", f"--node-ip-address={LOOPBACK}"]
        self._command += [f"--object-store-memory={_OBJECT_STORE_BYTES}", "--min-worker-port=0", "--max-worker-port=0"]
        self._command += ["--resources", json.dumps(dict(resources or {}))]
        merged = os.environ | _serve_settings(local.pid) | env | local.client_env
        self._env = {k: v for k, v in merged.items() if k != "RAY_ADDRESS"}
        self.start()

    def start(self) -> None:
        ports = [f"--{name}={port}" for name, port in zip(_PORTS, free_ports(len(_PORTS)), strict=True)]
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self._command + ports, env=self._env, start_new_session=True, stdout=log, stderr=log
            )
        self.pid = self._process.pid
        self._is_wanted = True

    def keep(self) -> None:
        """Starts it again if it has ended by itself: on a busy machine a node's start takes longer than Ray allows."""
        if self._is_wanted and self._process.poll() is not None:
            self.start()

    def kill(self) -> None:
        """Ends all its processes at once, by SIGKILL."""
        self._is_wanted = False
        deadline = time.monotonic() + _END_S
        while members := session_members(self.pid):
            for pid in members:
                kill(pid, signal.SIGKILL)
            assert time.monotonic() < deadline, f"a node's processes do not end: {members}"
            time.sleep(0.05)
        self._process.wait()


def _serve_settings(head: int) -> dict[str, str]:
    pairs = (pair.partition("=") for pair in Path(f"/proc/{head}/environ").read_text().split("\0"))
    return {name: value for name, _, value in pairs if name.startswith("RAY_SERVE_")}
