"""The catalog's operations are the same here and over HTTP: names, arguments, results and errors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from loray.client import CatalogClient
from loray.errors import AdapterNotFound, ConflictError, KeyNotFound, RevisionConflict
from loray.schemas.access import KeyChange, KeyCreation, TenantChange
from loray.service import CatalogService
from loray.spec import CanaryBounds, Limits, Principal
from tests.fixtures.api import Api
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.versions import BASE, publish

# Of a server alone: jobs, replicas, archives; and lists that no command needs.
ONLY_OVER_HTTP = {"audit", "download", "follow", "job", "jobs", "logs", "placement", "stop", "submit", "versions"}
Both = CatalogClient | CatalogService


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    api = Api(tmp_path / "home", sqlite_catalog(tmp_path))
    api.catalog.bases.add("smollm2", BASE)
    publish(api.catalog, "tone", 1, 2, 3)
    yield api
    api.close()


@pytest.fixture(params=["here", "over HTTP"])
def service(request: pytest.FixtureRequest, api: Api) -> Iterator[Both]:
    root = api.catalog.keys.create("root", scopes=["admin"])
    if request.param == "here":
        yield api.services.service_of(Principal(key_id=root.key.id))
    else:
        with CatalogClient("http://test", api_key=root.secret, transport=api.transport) as client:
            yield client


def test_commands_take_either() -> None:
    calls = {name for name in vars(CatalogClient) if not name.startswith("_")} - ONLY_OVER_HTTP
    assert calls <= set(vars(CatalogService))
    for name in calls:
        there, here = (inspect.signature(getattr(cls, name)).parameters for cls in (CatalogClient, CatalogService))
        asked = {n: p.kind for n, p in there.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
        assert asked.items() <= {n: p.kind for n, p in here.items()}.items(), name


def test_adapters_and_tags(service: Both) -> None:
    assert [base.name for base in service.bases()] == ["smollm2"]
    (found,) = service.adapters(search="TON")
    assert found == service.adapter("tone")
    assert (found.version, found.versions, found.base) == (3, (3, 2, 1), "smollm2")
    assert service.share("tone", "public").visibility == "public"
    assert service.set_tag("tone", "team", "support").value == "support"
    assert [adapter.name for adapter in service.adapters(tags={"team": None})] == ["tone"]
    service.delete_tag("tone", "team")
    assert service.tags("tone") == {}
    assert service.version("tone", 2).label == "tone@2"
    service.delete("tone", 2)
    with pytest.raises(AdapterNotFound, match="has no version 2"):
        service.version("tone", 2)


def test_promotion_with_preconditions(service: Both) -> None:
    first = service.promote("tone", "prod", 1, create=True)
    second = service.promote("tone", "prod", 2, etag=first.etag)
    for write in (
        lambda: service.promote("tone", "prod", 3, etag=first.etag),
        lambda: service.promote("tone", "prod", 3, create=True),
        lambda: service.rollback("tone", etag=first.etag),
        lambda: service.delete_alias("tone", "prod", etag=first.etag),
    ):
        with pytest.raises(RevisionConflict, match="revision"):
            write()
    assert service.alias("tone", "prod") == second
    assert service.rollback("tone", etag=second.etag).version == 1
    with pytest.raises(ConflictError, match="no earlier target"):
        service.rollback("tone")
    assert [a.alias for a in service.aliases("tone")] == ["prod"]
    service.delete_alias("tone", "prod")
    with pytest.raises(AdapterNotFound, match="no alias 'prod'"):
        service.alias("tone", "prod")


def test_canaries(service: Both) -> None:
    service.promote("tone", "prod", 2)
    running = service.set_canary("tone", "prod", 3, 10, bounds=CanaryBounds(min_requests=7))
    assert (running.percent, running.bounds.min_requests, running) == (10, 7, service.canary("tone"))
    assert service.alias("tone", "prod").weights == {2: 90, 3: 10}
    assert service.end_canary("tone").outcome == "ended"


def test_keys_and_tenants(service: Both) -> None:
    assert service.create_tenant("acme", Limits(rpm_limit=60)).rpm_limit == 60
    assert service.change_tenant("acme", TenantChange(blocked=True)).blocked
    assert [tenant.name for tenant in service.tenants()] == ["acme", "default"]
    made = service.create_key(KeyCreation(key_alias="ci", tenant="acme", rpm_limit=5))
    changed = service.change_key(made.id, KeyChange.model_validate({"rpm_limit": None, "models": ["tone"]}))
    assert (changed.rpm_limit, changed.models, service.key(made.id)) == (None, ("tone",), changed)
    assert [key.id for key in service.keys(tenant="acme", key_alias="ci")] == [made.id]
    assert service.rotate_key(made.id).key != made.key
    assert service.revoke_key(made.id).revoked_at is not None
    assert service.key().key_alias == "root"
    with pytest.raises(KeyNotFound, match="no key 'key-0'"):
        service.key("key-0")
    assert [row.num_requests for row in service.usage(["tenant"])] == []


def test_uploads(service: Both, tmp_path: Path) -> None:
    begun = service.begin_upload("once")
    assert begun == service.begin_upload("once")
    (tmp_path / "adapter_config.json").write_text("{}")
    sent = service.put_file(begun.id, tmp_path / "adapter_config.json")
    assert service.upload(begun.id).files == (sent,)
    service.delete_upload(begun.id)
