"""Questions that cost a client nothing cost the deployment little, however often they are asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import AdapterEntry, Catalog, CatalogSnapshot
from loray.schemas.openai import ModelList
from loray.spec import Principal
from serve_apps.gateway import bases, directory
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.gateway import ScriptedEngines, register
from tests.serve_apps.attacks.front import Front, front


class Counting(ScriptedEngines):
    num_asked = 0

    async def healthy(self) -> bool:
        self.num_asked += 1
        return await super().healthy()


def publisher(catalog: Catalog, tenant: str) -> Catalog:
    """The catalog as the tenant, which has uploaded what `register` names."""
    view = catalog.view(Principal(tenant=tenant, scopes=frozenset({"publish"})))
    view.adapters.record_upload("0" * 64)
    return view


def listed(gateway: Front, tenant: str, query: str = "") -> ModelList:
    headers = {"Authorization": f"Bearer {gateway.keys[tenant]}"}
    answer = gateway.client.get(f"/v1/models{query}", headers=headers)
    assert answer.status_code == 200, answer.text
    return ModelList.model_validate_json(answer.text)


def test_all_questions_about_the_health_are_one(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bases, "FRESH_S", 3600.0)
    engines = Counting()
    with front(tiny_base(), tmp_path, ("acme",), engines) as gateway:
        for _ in range(50):
            assert gateway.client.get("/health").status_code == gateway.client.post("/ping").status_code == 200
        assert engines.num_asked == 1
        monkeypatch.setattr(bases, "FRESH_S", 0.0)
        engines.replicas = []
        assert gateway.client.get("/health").status_code == 503


def test_a_key_may_list_the_models_so_often(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    with front(tiny_base(), tmp_path, ("acme", "other"), ScriptedEngines()) as gateway:
        codes = []
        for _ in range(70):
            headers = {"Authorization": f"Bearer {gateway.keys['acme']}"}
            answer = gateway.client.get("/v1/models", headers=headers)
            codes.append(answer.status_code)
            if answer.status_code == 429:
                assert "lists of models" in answer.text
                assert int(answer.headers["Retry-After"]) >= 1
                break
        assert codes[:60] == [200] * 60
        assert codes[-1] == 429
        assert len(listed(gateway, "other").data) == 1


def test_a_list_looks_at_no_name_that_the_caller_does_not_see(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base()
    with front(base, tmp_path, ("acme", "other"), ScriptedEngines()) as gateway:
        catalog = Catalog(sqlite_catalog(tmp_path))
        for tenant, num in (("acme", 3), ("other", 40)):
            view = publisher(catalog, tenant)
            for i in range(num):
                register(view, f"{tenant}-{i:03}", base.fingerprint)
        catalog.close()
        assert gateway.client.portal is not None
        gateway.client.portal.call(gateway.client.app.state.gateway.directory.follower.refresh)  # type: ignore[attr-defined]
        looked: list[str] = []
        monkeypatch.setattr(directory, "may_ask", lambda principal, name: looked.append(name) or True)
        monkeypatch.setattr("serve_apps.gateway.directory.may_ask", lambda principal, name: looked.append(name) or True)
        seen = [card.id for card in listed(gateway, "acme").data]
        assert seen == [base.name, *(f"acme/acme-{i:03}" for i in range(3))]
        assert sorted(looked) == sorted(seen)
        monkeypatch.setattr(directory, "MAX_CARDS", 30)
        first = listed(gateway, "other")
        assert (len(first.data), first.has_more) == (30, True)
        rest = listed(gateway, "other", f"?after={first.last_id}&limit=1000")
        assert (len(rest.data), rest.has_more) == (11, False)


def test_the_index_by_tenant_is_what_each_caller_sees(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    """After changes of visibility and owner, too."""
    base = tiny_base()
    catalog = Catalog(sqlite_catalog(tmp_path))
    tenants = ("acme", "beta", "default")
    for tenant in tenants[:2]:
        catalog.tenants.create(tenant)
    snapshot = CatalogSnapshot()

    def check() -> None:
        nonlocal snapshot
        snapshot = catalog.snapshot(snapshot)
        for tenant in tenants:
            caller = Principal(tenant=tenant, scopes=frozenset({"infer"}))
            for after in (None, "acme/a-1", "zzz"):
                expected = [e for e in snapshot.models(after) if e.exists_for(caller)]
                assert list(snapshot.models(after, caller)) == expected
            assert [e.name for e in snapshot.models(None, Principal())] == sorted(snapshot.adapters)

    for tenant in tenants:
        view = publisher(catalog, tenant)
        for i in range(3):
            register(view, f"a-{i}", base.fingerprint)
    check()
    for name, visibility, shared in (
        ("acme/a-0", "public", ()),
        ("acme/a-1", "shared", ("beta", "default")),
        ("a-1", "shared", ("acme",)),
        ("acme/a-0", "private", ()),
        ("acme/a-1", "shared", ("beta",)),
    ):
        catalog.adapters.share(name, visibility, shared)
        check()
    catalog.removal.delete_adapter("a-1")
    check()
    assert any(isinstance(entry, AdapterEntry) for entry in snapshot.models())
    catalog.close()
