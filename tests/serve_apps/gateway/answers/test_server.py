"""Answers behind uvicorn, with clients that are sockets: who leaves is noticed at once."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from loray.bases.registry import BaseModel
from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.gateway.scripted import ScriptedEngines, delta, gateway_app


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [[], [delta("a")]])
def test_a_client_that_leaves_cancels_its_requests(base: BaseModel, tmp_path: Path, stream: bool, script: Any) -> None:
    engines = ScriptedEngines(script, hang=True)
    body = json.dumps({"model": base.name, "prompt": "a", "n": 2, "stream": stream}).encode()
    fields = f"Host: test\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    head = f"POST /v1/completions HTTP/1.1\r\n{fields}\r\n\r\n".encode()

    async def run() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        app = gateway_app(base, sqlite_catalog(tmp_path), engines)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(head + body)
        if stream and script:
            await reader.readuntil(b'"text":"a"')
        while len(engines.requests) < 2:
            await asyncio.sleep(0.001)
        writer.transport.abort()
        while len(engines.closed) < 2:
            await asyncio.sleep(0.001)
        server.should_exit = True
        await serving

    asyncio.run(asyncio.wait_for(run(), 60))
