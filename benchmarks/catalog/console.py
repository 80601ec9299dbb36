"""Pages of the console over a filled catalog, as an administrator and as a tenant see them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx

from benchmarks.catalog.fill import adapter_name
from loray.api.status import BaseStatus, CatalogStatus, ReplicaStatus, Status, total
from loray.catalog import Catalog
from loray.spec import DEFAULT_TENANT, Scope, ServeSpec, split_qualified
from serve_apps.console import Gateway
from tests.serve_apps.api.fakes import Api

_PREFIX = "http://test/api/v1/console"
_NUM_REPLICAS = 50
_FORM = {"name": "new", "data.train": "s3://b/d.jsonl"}

Measure = Callable[[Callable[[], object]], float]  # seconds of a call


def console_pages(url: str, home: Path, num_adapters: int, num_tenants: int, measure: Measure) -> dict[str, float]:
    """Milliseconds of the slowest page, and of each. `pools_ms`: the page of serving where 50 replicas hold all
    adapters among them, with the reading of what the gateway says of that. The catalog has two keys afterwards.
    """
    names = [adapter_name(i, num_tenants) for i in range(1, num_adapters + 1)]
    tenant, name = split_qualified(names[num_adapters // 2])
    pages = {
        "adapters": f"/adapters?search={name[:4]}",
        "adapter": f"/adapters/{name}?tenant={tenant or DEFAULT_TENANT}",
        "upload": "/uploads",
        "new_job": "/jobs/new",
        "jobs": "/jobs",
        "playground": "/playground",
        "suggestions": "/playground/models?search=00042",
    }
    site, keys = Api(home, url), _keys(url, tenant or DEFAULT_TENANT)
    site.services.gateway = Gateway("http://gateway", httpx.MockTransport(partial(_answer, _state(names))))
    try:
        asked = {page: [partial(_ask, site, key, "GET", path) for key in keys] for page, path in pages.items()}
        asked["plan"] = [partial(_ask, site, key, "POST", "/jobs/plan") for key in keys]
        found = {f"{page}_page_ms": 1e3 * max(map(measure, calls)) for page, calls in asked.items()}
        pools_ms = 1e3 * measure(partial(_ask, site, keys[0], "GET", "/serving"))
    finally:
        site.close()
    return {"console_ms": max(found.values()), "pools_ms": pools_ms} | found


def _keys(url: str, tenant: str) -> tuple[str, str]:
    """An administrator's, and one of the tenant."""
    scopes: tuple[Scope, ...] = ("infer", "publish", "train")
    catalog = Catalog(url)
    try:
        admin = catalog.create_key("bench-admin", tenant=DEFAULT_TENANT, scopes=["admin"])
        return admin.secret, catalog.create_key("bench", tenant=tenant, scopes=scopes).secret
    finally:
        catalog.close()


def _state(names: list[str]) -> str:
    """What /status says: each replica's pool holds its part of the adapters, and its host the next one's."""
    parts = [tuple(f"{name}@1" for name in names[n::_NUM_REPLICAS]) for n in range(_NUM_REPLICAS)]
    replicas = tuple(
        ReplicaStatus(
            replica=f"r{n}",
            node="n",
            pid=n,
            uptime_s=1,
            blocks={"free": 100, "kv": 900},
            adapters_in_pool=part,
            adapters_on_host=parts[n - 1][:100],
        )
        for n, part in enumerate(parts)
    )
    return Status(
        status="ok",
        bases=(
            BaseStatus(
                base="smollm2",
                status="ok",
                num_replicas=len(replicas),
                target=len(replicas),
                num_adapters=len(names),
                spec=ServeSpec(base="smollm2"),
            ),
        ),
        catalog=CatalogStatus(num_adapters=len(names)),
        replicas=replicas,
        totals=total(replicas),
    ).model_dump_json()


def _answer(state: str, request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, text=state if request.url.path == "/status" else "")


def _ask(site: Api, key: str, method: str, path: str) -> None:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    site.http.request(method, _PREFIX + path, headers=headers, json=_FORM).raise_for_status()
