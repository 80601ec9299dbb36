"""Servers with OpenAI's API, which get prompts of token ids over HTTP; and loray's own: `loray serve`, `loray up`."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

from benchmarks.serving.cases import EngineOptions
from benchmarks.serving.replay import UNKNOWN_ID, replay_whole
from benchmarks.serving.systems.client import Received, ask, read_body, read_events
from benchmarks.serving.systems.cpu import CpuSeconds, idle_cores, of_home, of_tree
from benchmarks.serving.systems.processes import (
    PassResult,
    Setting,
    environment,
    run_process,
    serve_spec,
    tail,
)
from benchmarks.serving.workload import TimedRequest
from loray.local.processes import free_ports
from loray.settings import Settings
from loray.spec import AdapterRef

_START_S = 900.0


class OpenAiSession:
    """`names[i]` is the server's name of adapter i. `options`: further fields of every request.

    A server without token ids may send several tokens in one event. Each event then counts as one token, and the last
    event as all tokens that are missing from the request's length.
    """

    def __init__(
        self,
        port: int,
        model: str,
        names: Sequence[str],
        pid: int | None,
        start_s: float,
        cpu: CpuSeconds,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.pid, self.start_s, self.cpu = pid, start_s, cpu
        self.idle_cores = float("nan")
        self.port, self._model, self._names, self._options = port, model, names, options

    def run(self, requests: Sequence[TimedRequest], at_once: int | None) -> PassResult:
        return PassResult(asyncio.run(replay_whole(requests, at_once, self._ask, self._read)), None)

    async def _ask(self, index: int, request: TimedRequest) -> Received:
        body = {
            "model": self._model if request.adapter is None else self._names[request.adapter],
            "prompt": list(request.prompt_ids),
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": request.streamed,
            **self._options,
        }
        headers = {"X-Tenant-Id": request.tenant} if request.tenant else {}
        return await ask(self.port, "/v1/completions", body, headers)

    def _read(self, answer: Received, request: TimedRequest) -> Iterator[tuple[float, list[int]]]:
        if not request.streamed:
            pieces = list(read_body(answer))
            choice = json.loads(b"".join(data for _, data in pieces))["choices"][0]
            yield pieces[-1][0], list(choice.get("token_ids") or [UNKNOWN_ID] * request.max_tokens)
            return
        missing = request.max_tokens
        for at, event in read_events(answer):
            for choice in event["choices"]:
                ids = list(choice.get("token_ids") or ([UNKNOWN_ID] if choice.get("text") else ()))
                if choice.get("finish_reason") and "return_token_ids" not in self._options:
                    ids += [UNKNOWN_ID] * (missing - len(ids))
                missing -= len(ids)
                if ids:
                    yield at, ids


def wait_until_healthy(name: str, port: int, process: subprocess.Popen[str], log: Path) -> None:
    """SystemExit with the end of its log if the server ends or does not answer in time."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"{name} ended with code {process.returncode}:\n{tail(log)}")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"{name} did not answer within {_START_S:.0f} s:\n{tail(log)}")


def _home(setting: Setting, options: EngineOptions, port: int) -> tuple[Path, Settings]:
    """A separate home with this machine's bases and the benchmark's store and catalog; and its serve spec."""
    home = setting.folder / "served"
    home.mkdir(exist_ok=True)
    if not (home / "bases").exists():
        (home / "bases").symlink_to(Settings.from_env().home / "bases")
    spec = home / "spec.json"  # JSON is YAML
    spec.write_text(serve_spec(setting, options).model_copy(update={"port": port}).model_dump_json(), encoding="utf-8")
    return spec, Settings(home, setting.library.url, setting.library.catalog_url, address=None, log_level="WARNING")


@contextmanager
def serve_alone(setting: Setting, options: EngineOptions, refs: Sequence[AdapterRef]) -> Iterator[OpenAiSession]:
    """`loray serve`, ready."""
    port = free_ports(1)[0]
    spec, settings = _home(setting, options, port)
    command = [sys.executable, "-m", "loray.cli.main", "serve", "--spec", str(spec)]
    with run_process("loray-serve", command, setting, env=settings.to_env()) as (process, log):
        began = time.perf_counter()
        wait_until_healthy("loray serve", port, process, log)
        seconds = time.perf_counter() - began
        names = [ref.name for ref in refs]
        yield OpenAiSession(port, setting.base.name, names, process.pid, seconds, of_tree("serve", process.pid))


@contextmanager
def serve_cluster(setting: Setting, options: EngineOptions, refs: Sequence[AdapterRef]) -> Iterator[OpenAiSession]:
    """`loray up`, ready, and its cores when it is idle."""
    port = free_ports(1)[0]
    spec, settings = _home(setting, options, port)

    def loray(*command: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "loray.cli.main", *command],
            env=environment(setting, settings.to_env()),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"loray {command[0]} failed:\n{done.stdout}{done.stderr}")

    began = time.perf_counter()
    try:
        loray("up", "--spec", str(spec))
        seconds = time.perf_counter() - began
        cpu = of_home(str(settings.home))
        session = OpenAiSession(port, setting.base.name, [r.name for r in refs], None, seconds, cpu)
        session.idle_cores = idle_cores(cpu)
        yield session
    finally:
        loray("down")
