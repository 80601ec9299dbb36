"""What another tenant has asked does not show in how much of a prompt was cached: on a whole server with its engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastapi.testclient import TestClient

from loray.catalog import Catalog
from loray.publishing import Destination, import_folder
from loray.settings import Settings
from loray.spec import ServeSpec
from loray.store import AdapterStore, open_store
from serve_apps.replica.startup import adapter_loader, start_engine
from serve_apps.standalone.server import LocalEngineClient, create_site
from tests.fixtures.cluster import SERVE, served_base


def test_tenants_share_no_cached_prefix(tmp_path: Path, peft_folder: Callable[..., Path]) -> None:
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path / "home")})
    base = served_base(tmp_path / "checkpoint", settings.home)
    catalog = Catalog(settings.catalog)
    import_folder(peft_folder(base), base, Destination("tone", AdapterStore(open_store(settings.store)), catalog))
    catalog.adapters.share("tone", "public")
    keys = []
    for tenant in ("acme", "beta"):
        catalog.tenants.create(tenant)
        keys.append(catalog.keys.create(tenant, tenant=tenant, scopes=["infer"]).secret)
    spec = ServeSpec(base=base.name, dtype="float32", **SERVE)
    stream = start_engine(spec, base, adapter_loader(base, settings))
    try:
        with TestClient(create_site(spec, settings, LocalEngineClient(stream)), base_url="http://127.0.0.1") as client:

            def cached(key: str, model: str) -> int:
                body = {"model": model, "prompt": "A prompt of many blocks. " * 8, "max_tokens": 1}
                answer = client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
                assert answer.status_code == 200, answer.text
                return int(answer.json()["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0))

            for model in (base.name, "tone"):
                assert cached(keys[0], model) == 0
                assert cached(keys[0], model) > 100
                assert cached(keys[1], model) == 0
                assert cached(keys[1], model) > 100
    finally:
        stream.stop()
        catalog.close()
