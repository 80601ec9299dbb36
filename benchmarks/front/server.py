"""The process under test: a gateway on engines that compute nothing, or the floor.

    python -m benchmarks.front.server '{"kind": "gateway", "base": "smollm2", "home": HOME, "interval_s": 0.0}'

`kind`: "gateway", with its engines in process; "channel", with its engines in another process; "floor". It prints its
port when it answers, and ends when its input ends.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn
import uvloop
from fastapi import FastAPI

from benchmarks.front.engines import ChannelEngines, FakeEngines
from benchmarks.front.floor import FloorProtocol, chunk
from loray.bases.registry import BaseModel, get_base
from loray.settings import Settings
from loray.spec import ServeSpec
from serve_apps.auth import open_auth
from serve_apps.gateway.app import create_app
from serve_apps.gateway.bases import PromptEncoder, ServedBase
from serve_apps.gateway.directory import ModelResolver
from serve_apps.gateway.gateway import Gateway

_TEXT = (
    "The engine makes tokens and the gateway writes them as events, each with its text, until the last one has come."
)
# An event of the gateway, of the same length.
_EVENT = (
    'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1790000000,'
    '"model":"smollm2","system_fingerprint":"loray-0.1.0-0123456789ab","choices":[{"index":0,"text":" tokens",'
    '"logprobs":null,"finish_reason":null}]}\n\n'
)


def catalog_url(folder: Path) -> str:
    """Of a server's folder."""
    return f"sqlite:///{folder}/front.db"


def gateway_app(base: BaseModel, folder: Path, engines: Callable[[Sequence[int]], FakeEngines]) -> FastAPI:
    """`engines` makes them of the tokens that they yield."""
    prompts = PromptEncoder.load(base)
    token_ids = prompts.tokenizer.encode(_TEXT, special=False)
    settings = Settings.from_env({"LORAY_HOME": str(folder), "LORAY_CATALOG": catalog_url(folder)})
    access = open_auth(settings, "127.0.0.1")
    served = ServedBase(ServeSpec(base=base.name), base, prompts, engines(token_ids))
    return create_app(Gateway([served], ModelResolver([base], access.follower)), access)


async def _serve_gateway(app: FastAPI, listener: socket.socket, ended: asyncio.Event) -> None:
    """With uvicorn's settings of `loray serve`."""
    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", ws="none", lifespan="on", log_level="warning", access_log=False
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not task.done():
        await asyncio.sleep(0.01)
    _say_port(listener)
    await ended.wait()
    server.should_exit = True
    await task


async def _serve_floor(listener: socket.socket, ended: asyncio.Event) -> None:
    event = chunk(_EVENT)
    server = await asyncio.get_running_loop().create_server(lambda: FloorProtocol(event), sock=listener)
    _say_port(listener)
    await ended.wait()
    server.close()


def _say_port(listener: socket.socket) -> None:
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()


async def serve(setup: dict[str, str | float]) -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, ended.set)
    if setup["kind"] == "floor":
        await _serve_floor(listener, ended)
    else:
        made: list[FakeEngines] = []

        def engines(token_ids: Sequence[int]) -> FakeEngines:
            kind = ChannelEngines if setup["kind"] == "channel" else FakeEngines
            made.append(kind(token_ids, float(setup["interval_s"])))
            return made[-1]

        base = get_base(Path(str(setup["home"])), str(setup["base"]))
        await _serve_gateway(gateway_app(base, Path(str(setup["folder"])), engines), listener, ended)
        for each in made:
            each.close()


if __name__ == "__main__":
    uvloop.run(serve(json.loads(sys.argv[1])))
