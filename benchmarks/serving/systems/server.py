"""Servers with OpenAI's API, which get prompts of token ids over HTTP; and loray's, started by `loray up`."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import httpx

from benchmarks.serving.cases import EngineOptions
from benchmarks.serving.replay import UNKNOWN_ID, Record, replay
from benchmarks.serving.systems.processes import PassResult, Session, Setting, environment, serve_spec
from benchmarks.serving.workload import TimedRequest
from loray.local.processes import free_ports
from loray.settings import Settings
from loray.spec import AdapterRef


class OpenAiSession:
    """`names[i]` is the server's name of adapter i. `options`: further fields of every request.

    A server without token ids may send several tokens in one event. Each event then counts as one token, and the last
    event as all tokens that are missing from the request's length.
    """

    def __init__(
        self,
        url: str,
        model: str,
        names: Sequence[str],
        pid: int | None,
        start_s: float,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.pid, self.start_s = pid, start_s
        self._url, self._model, self._names, self._options = url, model, names, options

    def run(self, requests: Sequence[TimedRequest], at_once: int | None) -> PassResult:
        return PassResult(asyncio.run(self._run(requests, at_once)), None)

    async def _run(self, requests: Sequence[TimedRequest], at_once: int | None) -> list[Record]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._url, timeout=None, limits=limits) as client:

            async def submit(index: int, request: TimedRequest) -> AsyncIterator[list[int]]:
                async for ids in self._stream(client, request):
                    yield ids

            return await replay(requests, at_once, submit)

    async def _stream(self, client: httpx.AsyncClient, request: TimedRequest) -> AsyncIterator[list[int]]:
        body = {
            "model": self._model if request.adapter is None else self._names[request.adapter],
            "prompt": list(request.prompt_ids),
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            **self._options,
        }
        missing = request.max_tokens
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()[:300]}")
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event: dict[str, Any] = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                for choice in event["choices"]:
                    ids = list(choice.get("token_ids") or ([UNKNOWN_ID] if choice.get("text") else ()))
                    if choice.get("finish_reason") and "return_token_ids" not in self._options:
                        ids += [UNKNOWN_ID] * (missing - len(ids))
                    missing -= len(ids)
                    if ids:
                        yield ids


@contextmanager
def serve_ours(setting: Setting, options: EngineOptions, refs: Sequence[AdapterRef]) -> Iterator[Session]:
    """`loray up` in a separate home with this machine's bases, and with the benchmark's store and catalog."""
    home, port = setting.folder / "served", free_ports(1)[0]
    home.mkdir(exist_ok=True)
    bases = Settings.from_env().home / "bases"
    if not (home / "bases").exists():
        (home / "bases").symlink_to(bases)
    spec = home / "spec.json"  # JSON is YAML
    spec.write_text(serve_spec(setting, options).model_copy(update={"port": port}).model_dump_json(), encoding="utf-8")
    settings = Settings(home, setting.library.url, setting.library.catalog_url, address=None, log_level="WARNING")

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
        yield OpenAiSession(f"http://127.0.0.1:{port}", setting.base.name, [r.name for r in refs], None, seconds)
    finally:
        loray("down")
