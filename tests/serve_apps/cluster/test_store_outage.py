"""A store that is down when an adapter is loaded: that request fails, and a later one is served."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastapi.testclient import TestClient

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.local.s3 import start_local_s3, stop_local_s3
from loray.publishing import Destination, publish
from loray.settings import Settings
from loray.spec import ServeSpec
from loray.store import AdapterStore, open_store
from loray.store.s3 import create_bucket
from serve_apps.replica.startup import adapter_loader, start_engine
from serve_apps.standalone.server import LocalEngineClient
from tests.fixtures.gateway import gateway_app


def test_a_request_fails_and_a_later_one_is_served(
    tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_base()
    server = start_local_s3(tmp_path / "s3")
    location = server.location("adapters")
    create_bucket(location)
    settings = replace(Settings.from_env({"LORAY_HOME": str(tmp_path / "home")}), store=location.url)
    settings.home.mkdir()
    store, catalog = AdapterStore(open_store(settings.store)), Catalog(settings.catalog)
    publish(peft_folder(base), base, Destination("a", store, catalog))
    spec = ServeSpec(base=base.name, dtype="float32", pool_bytes=4 << 20, max_num_seqs=4, num_threads=1)
    stream = start_engine(spec, base, adapter_loader(base, settings))
    body = {"model": "a", "prompt": "hello", "max_tokens": 2}
    try:
        app = gateway_app(base, settings.catalog, LocalEngineClient(stream), dtype="float32")
        with TestClient(app, raise_server_exceptions=False) as client:
            stop_local_s3(tmp_path / "s3")
            failed = client.post("/v1/completions", json=body)
            assert (failed.status_code, failed.json()["error"]["code"]) == (503, "store_unavailable"), failed.text
            assert "cannot be reached" in failed.json()["error"]["message"]
            assert failed.headers["Retry-After"] == "1"
            assert client.post("/v1/completions", json=body | {"model": base.name}).status_code == 200
            assert start_local_s3(tmp_path / "s3").ports == server.ports
            time.sleep(1)  # as Retry-After says: a failed load is not tried again at once
            served = client.post("/v1/completions", json=body)
            assert served.status_code == 200, served.text
    finally:
        stream.stop()
        stop_local_s3(tmp_path / "s3")
