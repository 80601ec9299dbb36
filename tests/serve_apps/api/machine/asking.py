"""Requests to the catalog's API beside the model, and what is compared of their answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import httpx
from hypothesis.stateful import RuleBasedStateMachine

from tests.fixtures.api import Api
from tests.serve_apps.api.machine.model import BASE, DEFAULT, Adapter, Caller, Model, Refused, full_name

T = TypeVar("T")
ROOT = "a key of the deployment itself, long enough"


class AskingMachine(RuleBasedStateMachine):
    """`api` is new, has the base BASE, and admits ROOT. Its store has the adapters of `model.stored`."""

    def __init__(self, api: Api, model: Model) -> None:
        super().__init__()
        self.api, self.model = api, model
        self.root = Caller(ROOT, DEFAULT, frozenset({"admin"}))

    def teardown(self) -> None:
        try:
            self.list_all(self.root, 2)
            for adapter in self.model.visible(self.root):
                self.look(self.root, adapter.tenant, adapter.name.rpartition("/")[2])
        finally:
            self.api.close()

    def ask(
        self, who: Caller, scope: str | None, method: str, path: str, right: Callable[[], T], **options: Any
    ) -> tuple[httpx.Response, T] | None:
        """The answer, and what the model says; None where both refuse. `scope`: what the key needs."""
        options["params"] = {key: value for key, value in options.get("params", {}).items() if value is not None}
        headers = {"Authorization": f"Bearer {who.secret}"} | options.pop("headers", {})
        response = self.api.http.request(method, path, headers=headers, **options)
        told = f"{who}: {method} {path} {options} → {response.status_code} {response.text}"
        refused = None
        try:
            self.model.enter(who, scope)
            value = right()
        except Refused as e:
            refused = e.status
        assert response.status_code == refused if refused else response.is_success, f"{told}, and not {refused}"
        return None if refused else (response, value)

    # -- what is shown ------------------------------------------------------------------------------------------------

    def compare(self, shown: Mapping[str, Any], right: Mapping[str, Any]) -> None:
        assert {name: shown[name] for name in right} == right

    def adapter(self, who: Caller, adapter: Adapter) -> dict[str, Any]:
        digest = adapter.digests[adapter.default]
        return {
            "name": adapter.name,
            "tenant": adapter.tenant,
            "version": adapter.default,
            "digest": digest,
            "method": self.model.stored[digest].method,
            "base": BASE,
            "versions": adapter.versions,
            "aliases": adapter.aliases,
            "visibility": adapter.visibility,
            "shared_with": sorted(adapter.shared_with) if self.model.owns(who, adapter) else [],
        }

    def version(self, adapter: Adapter, number: int) -> dict[str, Any]:
        aliases = sorted(alias for alias, version in adapter.aliases.items() if version == number)
        return {"name": adapter.name, "version": number, "digest": adapter.digests[number], "aliases": aliases}

    def pages(self, who: Caller, path: str, limit: int, right: Callable[[], T], **params: Any) -> tuple[list[Any], T]:
        """The items of all pages; none where both refuse, which the first page shows."""
        items: list[Any] = []
        cursor: str | None = None
        while True:
            asked = params | {"limit": limit, "cursor": cursor}
            found = self.ask(who, None, "GET", path, right, params=asked)
            if found is None:
                raise Refused(0)
            page = found[0].json()
            assert len(page["items"]) <= limit
            assert page["items"] or page["next"] is None
            items += page["items"]
            if (cursor := page["next"]) is None:
                return items, found[1]

    def list_all(self, who: Caller, limit: int, **filters: str | None) -> None:
        """In pages, whose order is the database's."""
        try:
            items, right = self.pages(
                who, "/adapters", limit, lambda: list(self.model.visible(who, **filters)), **filters
            )
        except Refused:
            return
        assert sorted(item["name"] for item in items) == [adapter.name for adapter in right]
        shown = {item["name"]: item for item in items}
        for adapter in right:
            self.compare(shown[adapter.name], self.adapter(who, adapter))

    def look(self, who: Caller, of: str | None, name: str) -> None:
        """Everything about one name."""
        path, params = f"/adapters/{name}", {"tenant": of}
        found = self.ask(who, None, "GET", path, lambda: self.model.find(who, of, name), params=params)
        if found is None:
            return
        adapter = found[1]
        self.compare(found[0].json(), self.adapter(who, adapter))
        items, _ = self.pages(who, f"{path}/versions", 2, lambda: None, tenant=of)
        assert [item["version"] for item in items] == adapter.versions
        for item in items:
            self.compare(item, self.version(adapter, item["version"]))
        aliases = self.ask(who, None, "GET", f"{path}/aliases", lambda: None, params=params)
        assert aliases is not None
        shown = {item["alias"]: (item["version"], item["revision"]) for item in aliases[0].json()["items"]}
        assert shown == {alias: (adapter.aliases[alias], adapter.revisions[alias]) for alias in adapter.targets}

    # -- revisions ----------------------------------------------------------------------------------------------------

    def note_answer(self, answer: httpx.Response, adapter: Adapter, alias: str, *, moved: bool) -> None:
        """Of a request that may have moved an alias."""
        shown = answer.json()
        right = {"name": adapter.name, "alias": alias, "version": adapter.aliases[alias]}
        self.compare(shown, right | {"digest": adapter.digests[adapter.aliases[alias]]})
        assert answer.headers["etag"] == f'"{shown["revision"]}"'
        self.model.note_revision(adapter, alias, shown["revision"], moved=moved)

    def note_alias(self, adapter: Adapter, alias: str, *, moved: bool) -> None:
        """After a registration, whose answer has no revisions."""
        name, params = adapter.name.rpartition("/")[2], {"tenant": adapter.tenant}
        found = self.ask(self.root, None, "GET", f"/adapters/{name}/aliases/{alias}", lambda: None, params=params)
        assert found is not None
        self.note_answer(found[0], adapter, alias, moved=moved)

    def if_match(
        self, who: Caller, of: str | None, name: str, alias: str, offset: int | None
    ) -> tuple[int | None, dict[str, str]]:
        """A revision, `offset` beside that of now, and the header that asks for it."""
        if offset is None:
            return None, {}
        owner = next((t for t in (who.tenant, DEFAULT) if full_name(t, name) in self.model.adapters), DEFAULT)
        adapter = self.model.adapters.get(full_name(of or owner, name))
        revision = (1 if adapter is None else adapter.revisions.get(alias, 1)) + offset
        return revision, {"If-Match": f'"{revision}"'}
