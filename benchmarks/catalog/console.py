"""Pages of the console over a filled catalog, as an administrator and as a tenant see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import httpx

from benchmarks.catalog.fill import adapter_name
from benchmarks.catalog.history import fill_history, write_events
from benchmarks.catalog.state import metrics_text, status_json
from jobs.submission.tracker import RayJob
from loray.catalog import Catalog
from loray.spec import DEFAULT_TENANT, Scope, split_qualified
from serve_apps.console import GatewayClient
from tests.fixtures.api import Api

_PREFIX = "http://test/api/v1/console"
_FORM = {"name": "new", "data.train": "s3://b/d.jsonl"}
_NUM_JOBS = 20  # that have events

Measure = Callable[[Callable[[], object]], float]  # seconds of a call


def console_pages(url: str, home: Path, num_adapters: int, num_tenants: int, measure: Measure) -> dict[str, float]:
    """Milliseconds of the slowest page, and of each.

    Of serving, 50 replicas hold all adapters among them, and `serving_page_ms` has the reading of what the gateway
    says of that. `job_first_page_ms` is the first look at a job of 20,000 steps. The catalog has jobs, usage, an audit
    log and two keys afterwards.
    """
    names = [adapter_name(i, num_tenants) for i in range(1, num_adapters + 1)]
    tenant, name = split_qualified(names[num_adapters // 2])
    owner = tenant or DEFAULT_TENANT
    running, looked_at = fill_history(url, num_adapters, num_tenants), write_events(url, home, owner, _NUM_JOBS)
    site, keys = Api(home, url), _keys(url, owner)
    site.jobs.jobs = {id: RayJob("RUNNING", "") for id in running}
    site.services.gateway = GatewayClient("http://gateway", httpx.MockTransport(partial(_answer, _answers(names))))
    try:
        pages = {page: [partial(_ask, site, key, "GET", path) for key in keys] for page, path in _PAGES.items()}
        for page, path in _of_adapter(name, owner).items():
            pages[page] = [partial(_ask, site, key, "GET", path) for key in keys]
        pages |= {page: [partial(_ask, site, keys[0], "GET", path)] for page, path in _OF_ADMINISTRATORS.items()}
        pages["plan"] = [partial(_ask, site, key, "POST", "/jobs/plan") for key in keys]
        pages["job_first"] = [partial(_ask_in_turn, site, keys[0], cycle(looked_at).__next__)]
        compared = "&".join(f"job={job}" for job in looked_at[:4])
        pages["compare"] = [partial(_ask, site, key, "GET", f"/jobs/compare?{compared}") for key in keys]
        pages["job"] = [partial(_ask, site, key, "GET", f"/jobs/{looked_at[0]}") for key in keys]
        found = {f"{page}_page_ms": 1e3 * max(map(measure, calls)) for page, calls in pages.items()}
    finally:
        site.close()
    return {"console_ms": max(found.values())} | found


_PAGES: Mapping[str, str] = {
    "overview": "",
    "adapters": "/adapters",
    "upload": "/uploads",
    "new_job": "/jobs/new",
    "jobs": "/jobs",
    "jobs_running": "/jobs?status=running",
    "jobs_pending": "/jobs?status=pending",  # there is none
    "playground": "/playground",
    "suggestions": "/playground/models?search=00042",
    "usage_by_model": "/usage",
    "usage_by_key": "/usage?by=key",
}
_OF_ADMINISTRATORS: Mapping[str, str] = {"serving": "/serving", "replica": "/serving/replicas/r7", "keys": "/keys"}


def _of_adapter(name: str, owner: str) -> dict[str, str]:
    return {
        "search": f"/adapters?search={name[:4]}",
        "adapter": f"/adapters/{name}?tenant={owner}",
        "version": f"/adapters/{name}/versions/1?tenant={owner}",
        "difference": f"/adapters/{name}/diff?old=1&new=2&tenant={owner}",
    }


def _keys(url: str, tenant: str) -> tuple[str, str]:
    """An administrator's, and one of the tenant."""
    scopes: tuple[Scope, ...] = ("infer", "publish", "train")
    catalog = Catalog(url)
    try:
        admin = catalog.create_key("bench-admin", tenant=DEFAULT_TENANT, scopes=["admin"])
        return admin.secret, catalog.create_key("bench", tenant=tenant, scopes=scopes).secret
    finally:
        catalog.close()


def _answers(names: Sequence[str]) -> Mapping[str, str]:
    return {"/status": status_json(names), "/metrics": metrics_text()}


def _answer(answers: Mapping[str, str], request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, text=answers[request.url.path])


def _ask(site: Api, key: str, method: str, path: str) -> None:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    site.http.request(method, _PREFIX + path, headers=headers, json=_FORM).raise_for_status()


def _ask_in_turn(site: Api, key: str, next_job: Callable[[], str]) -> None:
    _ask(site, key, "GET", f"/jobs/{next_job()}")
