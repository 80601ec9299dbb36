"""Who listens between two nodes of a cluster. Linux's network namespaces are the nodes, with one link between them.

The gateway is on one node, the HTTP proxy and the engine are on the other: requests and tokens cross the link.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from loray.catalog import Catalog
from loray.local.processes import kill, session_members
from loray.settings import Settings
from loray.spec import FleetSpec, ServeSpec
from serve_apps.deployment import serve_config
from tests.fixtures.asking import eventually
from tests.fixtures.authority import Authority
from tests.fixtures.cluster import SERVE, served_base

IP = shutil.which("ip")
HEAD, OTHER = "10.231.7.1", "10.231.7.2"
NAMES = {HEAD: "loray-head", OTHER: "loray-other"}
LINK = "loray-link"
GCS, DASHBOARD, HTTP = 6399, 8299, 8298
WORD = "xylophone-quartet"
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory=80000000"]
LISTEN = """
import socket, sys
link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
link.bind((sys.argv[1], 0))
with open(sys.argv[2], "wb", 0) as heard:
    print("listens", flush=True)
    while True:
        heard.write(link.recv(1 << 17))
"""
CONVERSE = """
import json, sys, httpx
from serve_apps.deployment import ServeApi
dashboard, config, url, key, body = json.loads(sys.stdin.read())
api = ServeApi(dashboard)
api.deploy(config)
*_, state = api.watch(timeout_s=240)
assert state.is_running, state.message
answer = httpx.post(url, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60)
assert answer.status_code == 200, answer.text
print(json.dumps(answer.json()["usage"]))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(IP is None or os.geteuid() != 0, reason="needs root and iproute2, to make network namespaces"),
]


def inside(address: str, *command: str) -> list[str]:
    """The command, on this node."""
    return [str(IP), "netns", "exec", NAMES[address], *command]


@contextmanager
def linked() -> Iterator[None]:
    """Both nodes' namespaces, and the link."""

    def ip(*arguments: str) -> None:
        subprocess.run([str(IP), *arguments], check=True)

    with ExitStack() as stack:
        for name in NAMES.values():
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("-n", name, "link", "set", "lo", "up")
        ends = [f"{LINK}{n}" for n in range(len(NAMES))]
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for end, (address, name) in zip(ends, NAMES.items(), strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
        yield


@contextmanager
def running(command: list[str], env: Mapping[str, str], log: Path | int) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, all of which is killed at the end."""
    with ExitStack() as stack:
        to = log if isinstance(log, int) else stack.enter_context(log.open("wb"))
        process = subprocess.Popen(command, env=env, stdout=to, stderr=to, text=True, start_new_session=True)
        try:
            yield process
        finally:
            for pid in session_members(process.pid):
                kill(pid, signal.SIGKILL)
            process.wait()
            for stream in filter(None, (process.stdout, process.stderr)):
                stream.close()


def conversation(tls: Mapping[str, Mapping[str, str]]) -> tuple[bytes, str]:
    """A deployment and a question to it. Returns what crossed the link, and the key that asked."""
    # Not pytest's folder: paths of Ray's sockets must be short.
    with tempfile.TemporaryDirectory(prefix="two-", ignore_cleanup_errors=True) as folder:
        return _conversation(Path(folder), tls)


def _conversation(folder: Path, tls: Mapping[str, Mapping[str, str]]) -> tuple[bytes, str]:
    own = {"LORAY_HOME": str(folder / "home"), "LORAY_LOG_LEVEL": "WARNING", "LORAY_FRONT_GROUP": "front"}
    settings = Settings.from_env(own)
    base = served_base(folder / "checkpoint", settings.home)
    catalog = Catalog(settings.catalog)
    key, _ = catalog.keys.create("asks", scopes=("infer",))
    catalog.close()
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    common = os.environ | settings.to_env() | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    common |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    common = {name: value for name, value in common.items() if name != "RAY_ADDRESS"}
    head = [*RAY, "--head", f"--port={GCS}", f"--dashboard-port={DASHBOARD}", "--num-cpus=1"]
    head.append(f"--temp-dir={folder}/ray")
    other = [*RAY, f"--address={HEAD}:{GCS}", "--num-cpus=0"]
    fleet = FleetSpec.of(ServeSpec(base=base.name, dtype="float32", port=HTTP, **SERVE))
    body: dict[str, Any] = {"model": base.name, "max_tokens": 8, "messages": [{"role": "user", "content": WORD}]}
    asked = [f"http://127.0.0.1:{DASHBOARD}", serve_config(fleet, settings)]
    asked += [f"http://127.0.0.1:{HTTP}/v1/chat/completions", key, body]
    heard = folder / "heard"
    with ExitStack() as stack:
        stack.enter_context(linked())
        listen = inside(HEAD, sys.executable, "-c", LISTEN, f"{LINK}0", str(heard))
        listener = stack.enter_context(running(listen, common, subprocess.PIPE))
        assert listener.stdout is not None
        assert listener.stdout.readline() == "listens\n"
        for address, command in ((HEAD, head), (OTHER, other)):
            env = common | tls.get(address, {}) | ({"RAY_NODE_TYPE_NAME": "front"} if address == OTHER else {})
            command = [*command, f"--node-ip-address={address}"]
            log = folder / f"{address}.log"
            stack.enter_context(running(inside(address, *command), env, log))
            assert eventually(lambda log=log: "Ray runtime started" in log.read_text(), 120), log.read_text()
        talk = subprocess.run(
            inside(HEAD, sys.executable, "-c", CONVERSE),
            env=common | tls.get(HEAD, {}),
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            check=False,
        )
        assert talk.returncode == 0, talk.stderr[-3000:]
        assert json.loads(talk.stdout.splitlines()[-1])["completion_tokens"] > 0
    return heard.read_bytes(), key


def test_between_nodes_with_tls_there_is_neither_key_nor_word(tmp_path: Path) -> None:
    """Without TLS there is both, so this listener would hear them."""
    plain, key = conversation({})
    assert key.encode() in plain
    assert WORD.encode() in plain
    assert b"ServeReplica" in plain
    authority = Authority(tmp_path)
    certificates = {address: authority.node(address, "127.0.0.1") for address in NAMES}
    encrypted, key = conversation(certificates)
    assert len(encrypted) > 100_000
    assert not [word for word in (key.encode(), WORD.encode(), b"ServeReplica") if word in encrypted]
